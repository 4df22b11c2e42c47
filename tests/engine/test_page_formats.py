"""Merged and kept tokens in pages of every format: vLLM writes, layers read them.

See `page_cases` for what runs, in a process of its own.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CASES = Path(__file__).with_name("page_cases.py")
# One step between two codes, as a share of a vector's largest element.
STEPS = {
    "auto": 2e-6,
    "fp8": 1 / 8,
    "int8_per_token_head": 1 / 127,
    "fp8_per_token_head": 1 / 8,
    "int4_per_token_head": 2 / 15,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("pages")
    output = folder / "results.json"
    done = subprocess.run(
        [sys.executable, str(CASES), str(output)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize("kv_cache_dtype", STEPS)
def test_merged_tokens_are_a_step_off(
    results: dict[str, Any], kv_cache_dtype: str
) -> None:
    """Of float merging; layers of one direction are restored."""
    for case in ("apart", "alike"):
        assert max(results[kv_cache_dtype][case]["errors"]) < STEPS[kv_cache_dtype]


@pytest.mark.parametrize("kv_cache_dtype", STEPS)
def test_retained_tokens_move_bit_for_bit(
    results: dict[str, Any], kv_cache_dtype: str
) -> None:
    assert results[kv_cache_dtype]["apart"]["moved"]


@pytest.mark.parametrize("kv_cache_dtype", STEPS)
def test_kept_tokens_move_and_are_read(
    results: dict[str, Any], kv_cache_dtype: str
) -> None:
    assert results[kv_cache_dtype]["kept"] == {"moved": True, "read": True}
