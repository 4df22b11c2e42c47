"""`vllm serve --data-parallel-size 2`: each engine compresses, and counts its own."""

import re
import time
from pathlib import Path

import pytest

import vllm_kvcompress
from tests.engine.served import serving

pytest.importorskip("vllm")

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1500)]

MODEL = Path(vllm_kvcompress.__file__).parent / "assets" / "needle"
BUDGET = 256
PATIENCE = 600  # seconds to start
PROMPT = [1, *(4 + i % 200 for i in range(999))]
FLAGS = [
    *("--kv-compression", "snapkv", "--kv-compression-config.budget", str(BUDGET)),
    *("--block-size", "32", "--max-model-len", "2048", "--dtype", "float32"),
    *("--served-model-name", "needle", "--enforce-eager"),
]


def ask(client, rank):
    """Ten tokens and their log-probabilities from the engine with this number."""
    body = {"model": "needle", "prompt": PROMPT, "max_tokens": 10, "temperature": 0}
    answer = client.post(
        "/v1/completions",
        json={**body, "logprobs": 5},
        headers={"X-data-parallel-rank": str(rank)},
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["logprobs"]


def counted(client, name):
    """A counter of all engines, by engine."""
    sample = rf'^vllm:kv_compression_{name}_total{{engine="(\d)".*}} (\S+)$'
    found = re.findall(sample, client.get("/metrics").text, re.MULTILINE)
    return {int(engine): float(value) for engine, value in found}


def wait_for(client, name, wanted):
    """Statistics lag a little behind the answers."""
    for _ in range(50):
        if (found := counted(client, name)) == wanted:
            break
        time.sleep(0.2)
    assert found == wanted


def test_each_engine_compresses_and_counts(tmp_path):
    log = tmp_path / "log.txt"
    two = ["--data-parallel-size", "2", "--api-server-count", "1"]
    with serving(MODEL, [*FLAGS, *two], log, PATIENCE) as client:
        assert counted(client, "compressions") == {0: 0, 1: 0}
        first = ask(client, 0)
        wait_for(client, "compressions", {0: 1, 1: 0})
        assert ask(client, 1) == first
        wait_for(client, "compressions", {0: 1, 1: 1})
        freed = counted(client, "blocks_freed")
        assert freed[0] == freed[1] > 0
        retained = counted(client, "retained_tokens")
        assert retained[0] == retained[1] <= BUDGET
    with serving(MODEL, FLAGS, log, PATIENCE) as client:
        assert ask(client, 0) == first
