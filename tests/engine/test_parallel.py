"""Tensor parallelism: two workers keep and answer what one does, head by head."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import kept
from tests.engine.conftest import save_llama, save_lopsided

CASES = Path(__file__).with_name("parallel_cases.py")
LENGTHS = [500, 90, 231]
METHODS = ["random", "tova", "rkv", "keydiff"]
ADA = {"budget": 160, "window": 16, "floor": 0.0, "decode": {"interval": 48}}
# By the number of KV heads: with one, both workers hold it.
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "snapkv": (
        2,
        {
            "budget": 128,
            "window": 16,
            "decode": {"interval": 48},
            "request_methods": METHODS,
        },
    ),
    "minicache": (
        2,
        {
            "start_layer": 0,
            "over": {"method": "snapkv", "window": 16},
            "budget": 128,
            "interval": 32,
        },
    ),
    "pyramidinfer": (2, {"decay_ratio": 0.6, "min_context": 16, "layers_per_tier": 1}),
    "ada_snapkv": (4, ADA),
    "ada_snapkv, one KV head": (1, {**ADA, "request_methods": ["snapkv", *METHODS]}),
}


def run(
    model: Path, workers: int, settings: dict[str, Any], output: Path, stages: int = 1
) -> Any:
    """What `parallel_cases` finds; our engine checks itself meanwhile."""
    cores = sorted(os.sched_getaffinity(0))
    count = workers * stages
    binding = "|".join(str(cores[worker % len(cores)]) for worker in range(count))
    sizes = [str(model), str(workers), str(stages)]
    words = [*sizes, json.dumps(settings), json.dumps(LENGTHS)]
    done = subprocess.run(
        [sys.executable, str(CASES), *words, str(output)],
        env={
            **os.environ,
            "VLLM_CPU_OMP_THREADS_BIND": binding,
            "VLLM_KVCOMPRESS_CHECK": "poison",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        },
        cwd=output.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(output)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", SETTINGS)
def test_two_workers_keep_and_answer_as_one(tmp_path: Path, case: str) -> None:
    method, (kv_heads, own) = case.partition(",")[0], SETTINGS[case]
    uneven = method == "ada_snapkv"
    save = save_lopsided if uneven else save_llama
    model = save(tmp_path / "model", kv_heads=kv_heads)
    settings = {"method": method, **own}
    alone, shared = (
        run(model, workers, settings, tmp_path / "found.pt") for workers in (1, 2)
    )
    assert alone["compressions"] > 1
    assert alone["kept"][0]
    assert len(shared["kept"]) == 2
    for rank, found in enumerate(shared["kept"]):
        assert found == kept.part(alone["kept"][0], rank, 2)
    for name in ("tokens", "compressions", "preemptions"):
        assert shared[name] == alone[name]
    assert alone["left"] == shared["left"] == 0
    # What one worker's heads keep beyond the mean is held by both, and no more.
    more = sum(shared["overflow"].values())
    assert (more > 0) == (uneven and kv_heads > 1)
    assert not alone["overflow"]
    assert alone["blocks_freed"] - shared["blocks_freed"] == more
    told = zip(alone["told"], shared["told"], strict=True)
    for request, (one, two) in enumerate(told):
        own = [n for (name, _), n in shared["overflow"].items() if name == str(request)]
        assert one - two == sum(own)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(1200)
def test_stages_of_two_workers_keep_and_answer_as_one(tmp_path: Path) -> None:
    """The last stage tells the scheduler what the first one's heads need."""
    model = save_lopsided(tmp_path / "model", kv_heads=4)
    settings = {"method": "ada_snapkv", **ADA, "layers_per_tier": 1}
    alone, shared = (
        run(model, n, settings, tmp_path / "found.pt", stages=n) for n in (1, 2)
    )
    assert shared["tokens"] == alone["tokens"]
    whole = alone["kept"][0]
    for worker, found in enumerate(shared["kept"]):
        stage, rank = divmod(worker, 2)
        own = {name: records[stage::2] for name, records in whole.items()}
        assert found == kept.part(own, rank, 2)
    assert {group for (_, group), n in shared["overflow"].items() if n} == {0, 1}
    more = sum(shared["overflow"].values())
    assert alone["blocks_freed"] - shared["blocks_freed"] == more
    assert alone["left"] == shared["left"] == 0
