"""A short soak of a real server; `make soak` runs a long one."""

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.engine.soak import LASTING, soak
from tests.engine.soak_requests import ENDS

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_disorderly_clients_in_little_space(tmp_path: Path) -> None:
    report = soak(requests=LASTING, each=10, seed=1, log=tmp_path / "log.txt")
    assert not report.wrong, report.wrong[:5]
    assert {*ENDS} <= report.ends.keys()
    assert report.metrics["vllm:kv_compression_compressions_total"] > 1000
    assert report.metrics["vllm:num_preemptions_total"] > 0
    assert report.memory  # flat, or that is wrong
    assert report.compared["as alone"] > 1000
