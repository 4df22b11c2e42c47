"""A tiny sweep through real vLLM."""

import json
from pathlib import Path

import pytest

from vllm_kvcompress.tools.main import main


@pytest.mark.slow
@pytest.mark.vllm
def test_tiny_sweep(tmp_path: Path) -> None:
    file, plot = tmp_path / "sweep.json", tmp_path / "sweep.png"
    flags = "--methods snapkv,random --budgets 128 --prompt-len 1024 --requests 3"
    assert (
        main(["sweep", *flags.split(), "--json", f"{file}", "--plot", f"{plot}"]) == 0
    )
    stock, snapkv, floor = json.loads(file.read_text())["arms"]
    assert stock["accuracy"] == snapkv["accuracy"] == 1
    assert floor["accuracy"] < 1
    # One block of 32 tokens holds what is generated.
    assert stock["kv_blocks_per_request"] == 1024 / 32 + 1
    assert snapkv["kv_blocks_per_request"] == 128 / 32 + 1
    assert plot.stat().st_size > 0
