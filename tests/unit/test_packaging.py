"""What is shipped, and the lists that must name the same methods."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

from tests.matrix import METHODS as MATRIX
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted((ROOT / "configs").glob("*.yaml"))


def read_preset(path):
    """The settings that a preset stands for."""
    preset = yaml.safe_load(path.read_text())
    return {"method": preset["kv-compression"], **preset["kv-compression-config"]}


def test_triton_kernels_is_not_ours():
    # vLLM imports a package of this name.
    spec = find_spec("triton_kernels")
    places = [] if spec is None else [*(spec.submodule_search_locations or ())]
    assert not [p for p in places if Path(p).resolve().is_relative_to(ROOT)]


def test_matrix_names_every_method():
    assert {entry["method"] for entry in MATRIX} == set(METHODS)


def test_readme_names_every_method():
    section = (ROOT / "README.md").read_text().partition("\n## Methods\n")[2]
    table = section.partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` ", table, re.MULTILINE) == list(METHODS)


@pytest.mark.parametrize("settings", MATRIX, ids=str)
def test_matrix_entry_is_valid(settings):
    assert KVCompressionConfig.from_dict(settings).method == settings["method"]


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_preset_is_valid(path):
    config = KVCompressionConfig.from_dict(read_preset(path))
    assert config.method == path.stem.split("-")[0]


@pytest.mark.vllm
@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_preset_survives_vllm_config_loader(path):
    argparse_utils = pytest.importorskip("vllm.utils.argparse_utils")
    parser = argparse_utils.FlexibleArgumentParser()
    arguments = iter(parser.load_config_file(str(path)))
    given = dict(zip(arguments, arguments, strict=True))
    settings = yaml.safe_load(given.pop("--kv-compression-config"))
    settings["method"] = given.pop("--kv-compression")
    assert settings == read_preset(path)
    assert not given


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from an sdist, built from a copy of the tree."""
    tmp = tmp_path_factory.mktemp("dist")
    source = tmp / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ("vllm_kvcompress", "configs", "csrc", "triton_kernels"):
        if (ROOT / folder).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp, source]
    subprocess.run(build, check=True, cwd=tmp, capture_output=True)
    (path,) = tmp.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The Python of a fresh environment: the wheel, and ours for its dependencies."""
    home = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", wheel], check=True)
    # The .pth files in there, such as our editable install's, are not followed.
    (site,) = home.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run_in(python, code):
    """What the code prints, run away from the repository."""
    command = [python, "-I", "-c", code]
    done = subprocess.run(command, cwd="/", text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
def test_wheel_holds_everything(wheel):
    package = ROOT / "vllm_kvcompress"
    expected = {
        str(path.relative_to(ROOT))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    expected |= {f"vllm_kvcompress/configs/{path.name}" for path in PRESETS}
    for pattern in ("configs/*/*.json", "triton_kernels/*.py"):
        found = {path.relative_to(ROOT) for path in ROOT.glob(pattern)}
        assert found, pattern
        expected |= {f"vllm_kvcompress/{path}" for path in found}
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert expected <= names
    assert {name.partition("/")[0] for name in names} == {"vllm_kvcompress"}


@pytest.mark.slow
def test_wheel_is_what_is_imported(installed):
    code = "import vllm_kvcompress as package; print(package.__file__)"
    (place,) = run_in(installed, code)
    assert Path(place).is_relative_to(installed.parent.parent)


@pytest.mark.slow
def test_wheel_entry_points(installed):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    expected = {
        value
        for entries in (project["scripts"], *project["entry-points"].values())
        for value in entries.values()
    }
    code = """if True:
        from importlib.metadata import distribution
        for entry in distribution("vllm-kvcompress").entry_points:
            entry.load()
            print(entry.value)
    """
    assert set(run_in(installed, code)) == expected
    assert (installed.parent / "kvcompress").exists()


@pytest.mark.slow
def test_wheel_data_can_be_read(installed):
    code = """if True:
        from importlib.resources import files
        for name in ("vllm_kvcompress.configs", "vllm_kvcompress"):
            for item in files(name).iterdir():
                print(item.name)
    """
    names = run_in(installed, code)
    assert {path.name for path in PRESETS} <= set(names)
    assert "config.py" in names


@pytest.mark.slow
def test_editable_install_finds_presets():
    # What `make setup` installs; a mapped folder is easily lost here.
    code = """if True:
        from importlib.resources import files
        print(*[p.name for p in files("vllm_kvcompress.configs").iterdir()])
    """
    assert {path.name for path in PRESETS} <= set(run_in(sys.executable, code))
