"""The CUDA kernels compile for all kinds of GPUs; registers are reported (`-rP`)."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "csrc/cuda/kernels.cu"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers.*?(?P<shared>\d+) bytes smem",
    re.DOTALL,
)

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


def nvcc(*arguments: object) -> str:
    """All that it says."""
    command = [str(x) for x in (NVCC, "-std=c++17", *arguments, SOURCE)]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("kind", [80, 90, 100])
def test_compiles_without_spills(kind: int, tmp_path: Path) -> None:
    code = tmp_path / "kernels.cubin"
    warnings = ("-Werror", "all-warnings", "-Xptxas=-v,-Werror")
    told = nvcc("-O3", *warnings, f"-arch=sm_{kind}", "-cubin", "-o", code)
    assert code.stat().st_size
    kernels = [found.groupdict() for found in REPORT.finditer(told)]
    for kernel in kernels:
        print("{registers} registers, {shared} bytes shared: {name}".format(**kernel))
    # One for each width of units, the overlap and the selection.
    assert len(kernels) == told.count("Compiling entry function") == 7
    assert all(kernel["stores"] == kernel["loads"] == "0" for kernel in kernels)


def test_needs_no_headers_of_torch_or_python() -> None:
    needed = nvcc("-M").replace("\\\n", " ").split()
    ours = {"api.h", "compact.cuh", "select.cuh"}
    assert ours <= {Path(path).name for path in needed}
    foreign = re.compile(r"/(torch|ATen|c10|pybind11)/|/python3|Python\.h")
    assert not [path for path in needed if foreign.search(path)]
