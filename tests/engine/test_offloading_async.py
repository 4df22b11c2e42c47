"""KV offloading with compression where steps overlap, on both model runners."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.engine.conftest import BLOCK, Answer
from vllm_kvcompress.engine.check.switch import VARIABLE

CASES = Path(__file__).with_name("offload_cases.py")

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_answers_and_loads(llama: Path, runner: str, tmp_path: Path) -> None:
    output = tmp_path / "found.pt"
    done = subprocess.run(
        [sys.executable, str(CASES), runner, str(llama), str(output)],
        env={**os.environ, VARIABLE: "poison"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = torch.load(output)
    assert found["scheduler"] == "CheckedAsyncScheduler"
    assert found["fenced"]
    plain, *others = [[Answer(**own) for own in each] for each in found["answers"]]
    for answers in others:
        for mine, theirs in zip(answers, plain, strict=True):
            assert mine.near(theirs)
    # In little space blocks are lost before they are stored, and no more than some.
    for answer, most in zip(others[-1], found["hits"], strict=True):
        assert 2 * BLOCK < answer.cached <= most
