"""Tables of launch parameters, what the provider refuses, and how it is chosen."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from vllm_kvcompress.triton_kernels import launch

from vllm_kvcompress import triton_kernels
from vllm_kvcompress.ops.providers import Pages, Setting, choose, operations

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ROWS = (0, 16, 1)


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of tables, and nothing remembered of others."""
    monkeypatch.setattr(launch, "_folder", lambda: tmp_path)
    launch._entry.cache_clear()
    launch._log_once.cache_clear()
    yield tmp_path
    launch._entry.cache_clear()


def _write(folder: Path, table: object) -> None:
    (folder / "select.json").write_text(json.dumps(table))


@pytest.mark.parametrize(
    ("name", "tile"),
    [
        ("", 16),
        ("NVIDIA H100 80GB HBM3", 32),
        ("NVIDIA H200", 32),
        ("NVIDIA GH200 480GB", 32),
        ("NVIDIA A100-SXM4-80GB", 64),
        ("NVIDIA L40S", 16),
        ("NVIDIA H100X", 16),
    ],
)
def test_entry_of_a_chip_or_its_family(tables: Path, name: str, tile: int) -> None:
    sizes = {"default": 16, "H100": 32, "A100": 64}
    _write(tables, {chip: {"BLOCK_TOKENS": size} for chip, size in sizes.items()})
    assert launch._entry("select", name) == {"BLOCK_TOKENS": tile}


def test_own_entry_comes_before_the_family(tables: Path) -> None:
    _write(tables, {x: {"BLOCK_A": n} for n, x in enumerate(("H100", "default"), 1)})
    table = json.loads((tables / "select.json").read_text())
    _write(tables, {**table, "H200": {"BLOCK_A": 8}})
    assert launch._entry("select", "NVIDIA H200") == {"BLOCK_A": 8}


def test_unknown_device_is_logged_once(
    tables: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.logger, "propagate", True)
    for operation in ("select", "pool"):
        table = {"default": {"BLOCK_TOKENS": 16}}
        (tables / f"{operation}.json").write_text(json.dumps(table))
    with caplog.at_level(logging.INFO, logger=launch.logger.name):
        for operation in ("select", "pool", "select"):
            launch._entry(operation, "Some Chip 9")
        launch.parameters("pool", CPU)
    assert [record.args for record in caplog.records] == [("Some Chip 9",)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting"),
        ("[1]", "no entry 'default'"),
        ('{"H100": {}}', "no entry 'default'"),
        ('{"default": 3}', "no entry 'default'"),
        ('{"default": {"BLOCK_A": 16}, "H100": 3}', "'H100' must have"),
        ('{"default": {"BLOCK_A": 16}, "H100": {"BLOCK_B": 16}}', "'H100' must have"),
        ('{"default": {"BLOCK_A": 48}}', "BLOCK_A of 'default' is 48"),
        ('{"default": {"num_stages": 0}}', "num_stages of 'default' is 0"),
        ('{"default": {"num_warps": true}}', "num_warps of 'default' is True"),
        ('{"default": {"num_warps": "4"}}', "num_warps of 'default' is '4'"),
    ],
)
def test_broken_table(tables: Path, text: str, reason: str) -> None:
    (tables / "select.json").write_text(text)
    with pytest.raises(ValueError, match=f"select.json.*{reason}"):
        launch.parameters("select", CPU)


def test_missing_table(tables: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.json"):
        launch.parameters("nothing", CPU)


def test_every_operation_has_a_table() -> None:
    folder = files("vllm_kvcompress.configs") / "kernels"
    names = {path.name.removesuffix(".json") for path in folder.iterdir()}
    assert triton_kernels.KERNELS.keys() <= names
    for path in folder.iterdir():
        assert launch.DEFAULT in launch.read(path)


def test_kernels_are_of_operations() -> None:
    assert triton_kernels.KERNELS.keys() <= operations().keys()


def _refusal(operation: str | None, pages: Pages) -> str | None:
    return triton_kernels.refusal(
        Setting(CPU, frozenset([pages]), by_name=True), operation
    )


def test_the_interpreter_is_taken_by_name_only() -> None:
    assert triton_kernels.refusal(Setting(CPU), None) == "needs a GPU"
    assert triton_kernels.refusal(Setting(CPU, by_name=True), None) is None


@pytest.mark.parametrize("operation", [None, *triton_kernels.KERNELS])
def test_no_gpu(monkeypatch: pytest.MonkeyPatch, operation: str | None) -> None:
    monkeypatch.setattr(triton_kernels, "INTERPRETED", False)
    by_name = Setting(CPU, by_name=True)
    assert triton_kernels.refusal(by_name, operation) == "needs a GPU"
    assert triton_kernels.refusal(Setting(GPU), operation) is None


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "INTERPRETED", True)


@pytest.mark.usefixtures("interpreted")
def test_pages_that_are_read() -> None:
    common = Pages(torch.bfloat16, 16, 128, ROWS, ROWS)
    tiled = Pages(torch.bfloat16, 16, 128)
    tiled_values = Pages(torch.bfloat16, 16, 128, ROWS)
    for operation in (None, *triton_kernels.KERNELS):
        assert _refusal(operation, common) is None
        reads = operation in ("window_scores", "compact", "attend_pages")
        assert _refusal(operation, tiled) == ("reads no tiled pages" if reads else None)
        reads = operation in ("compact", "attend_pages")
        expected = "reads no tiled pages" if reads else None
        assert _refusal(operation, tiled_values) == expected


@pytest.mark.usefixtures("interpreted")
def test_types_and_sizes_that_are_read() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        assert _refusal("window_scores", Pages(dtype, 16, 80, ROWS, ROWS)) is None
    other = Pages(torch.float8_e5m2, 16, 80, ROWS, ROWS)
    assert _refusal("window_scores", other) == "does not read torch.float8_e5m2"
    assert _refusal("compact", other) is None
    wide = Pages(torch.float64, 16, 80, ROWS, ROWS)
    assert _refusal("compact", wide) == "does not move torch.float64"
    long = Pages(torch.float16, 16, 576, ROWS, ROWS)
    assert "head size above 256" in (_refusal("attend_pages", long) or "")
    assert _refusal("compact", long) is None


@pytest.mark.usefixtures("interpreted")
def test_chosen_by_name() -> None:
    setting = Setting(CPU, frozenset([Pages(torch.float32, 16, 8, ROWS, ROWS)]))
    try:
        choose(setting, {"all": "triton"})
        for name, kernel in triton_kernels.KERNELS.items():
            assert operations()[name].provider == "triton"
            assert operations()[name]._run is kernel
    finally:
        choose(setting, {"all": "torch"})


def test_nothing_of_vllm_is_imported() -> None:
    code = """if True:
        import sys
        import vllm_kvcompress.triton_kernels
        assert not [name for name in sys.modules if name.split(".")[0] == "vllm"]
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_without_triton_the_reason_is_given() -> None:
    code = """if True:
        import sys
        sys.modules["triton"] = None
        import torch
        from vllm_kvcompress.ops.providers import Setting, _refusal
        print(_refusal("triton", Setting(torch.device("cuda")), None))
    """
    told = subprocess.check_output([sys.executable, "-c", code], cwd="/", text=True)
    assert told.strip() == "Triton is not installed"
