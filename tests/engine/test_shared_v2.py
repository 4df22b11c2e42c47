"""Models that share KV on vLLM's V2 runner and a GPU backend, all on the CPU.

See `v2_harness` for how.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("shared_v2_cases.py")
NAMES = "cla2,lckv,lckv_some_slide,yoco,yoco_retention"
RUNNER = "vllm.v1.worker.cpu.model_runner"
TOLERANCE = 1e-4
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        ("CPU_ATTN", "CPUAttentionBackend"),
        pytest.param("TRITON_ATTN", "TritonAttentionBackend", marks=pytest.mark.slow),
    ],
)
def test_answers_are_the_definitions(backend: str, kind: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(CASES), backend, NAMES, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert sorted(results) == sorted(NAMES.split(","))
    for name, case in results.items():
        assert RUNNER in case["runner"]
        assert any(kind in used for used in case["backends"]), case["backends"]
        for errors in (case["whole"], case["chunks"]):
            assert max(errors.values()) < TOLERANCE, (name, errors)
