"""The scheduler and its workers keep the design's invariants under any workload.

Hypothesis thinks of the workloads, and bugs that are planted on purpose show that the
checks of `Run` find them.
"""

import os
from collections import Counter
from functools import cache
from typing import Any

import pytest

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
pytest.importorskip("vllm")

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.unit.planted import PLANTED
from tests.unit.planted_merges import MERGES
from tests.unit.simulation import Run
from tests.unit.workloads import RUNNERS, Arrival, Workload, workloads
from vllm_kvcompress import methods
from vllm_kvcompress.engine.check.ledger import Violation

pytestmark = pytest.mark.vllm

# What `Run` counts, and workloads have to bring about.
HAPPENS = [
    "compressions",
    "while reading",
    "while generating",
    "once more",
    "again",
    "late",
    "tiers apart",
    "by another method",
    "beyond the pool",
    "hits",
    "pool dry",
    "pruned",
    "generated tokens go",
    "merges",
    "generated tokens merge",
    "selected, then merged",
    "told",
    "drafts accepted",
    "drafts rejected",
]


@pytest.fixture(autouse=True)
def _find_methods_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of engines would spend half of their time on it."""
    monkeypatch.setattr(methods, "entry_points", cache(methods.entry_points))


def explore(
    examples: int,
    number: int | None = 0,
    phases: tuple[Phase, ...] = tuple(Phase),
    **fixed: Any,
) -> Counter[str]:
    """Run workloads, and return how much of what happened in them.

    Args:
        examples: How many.
        number: Seed, None = other ones each time.
        phases: Of hypothesis.
        fixed: Fields that all workloads have in common.
    """
    seen: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(workloads(**fixed))
    def check(load: Workload) -> None:
        run = Run(load)
        run.run()
        seen.update(run.seen)

    (check if number is None else seed(number)(check))()
    return seen


@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("runner", RUNNERS)
def test_invariants(runner: str, number: int) -> None:
    seen = explore(200, number, runner=runner, pyramid=False)
    seen += explore(100, number, runner=runner, pyramid=True)
    seen += explore(150, number, runner=runner, merging=True)
    whole = dict(layered=True, groups="CC", chunk=64, long_prefill=0)
    seen += explore(60, number, runner=runner, pyramid=True, **whole)
    assert all(seen[what] for what in HAPPENS), seen


@pytest.mark.parametrize(("runner", "asynchronous"), [("V1", False), ("V2", True)])
def test_invariants_in_a_pipeline(runner: str, asynchronous: bool) -> None:
    fixed = dict(runner=runner, asynchronous=asynchronous, stages=2)
    seen = explore(100, **fixed)
    seen += explore(50, merging=True, **fixed)
    assert all(seen[what] for what in ("while generating", "again", "hits")), seen


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("runner", RUNNERS)
def test_invariants_at_length(runner: str) -> None:
    explore(8000, None, runner=runner)


def test_a_prompt_longer_than_the_pool_is_never_starved() -> None:
    """Shared blocks leave no private ones, and waiting must not fill the pool."""
    settings = {
        "method": "streamingllm",
        "sinks": 0,
        "budget": 11,
        "prefill": "incremental",
        "prefill_interval": 5,
        "decode": {"interval": 3},
    }
    short, long = Arrival(0, 17, 0, 0, 1), Arrival(0, 17, 9, 3, 1)
    arrivals = [short, long, *[short] * 4]
    run = Run(Workload(settings, arrivals, chunk=8, max_seqs=3, reserve=False))
    run.run()
    assert run.seen["late"] > 0


@pytest.mark.parametrize("bug", [*PLANTED, *MERGES])
def test_simulator_finds_planted_bugs(
    bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, plant, hints = {**PLANTED, **MERGES}[bug]
    monkeypatch.setattr(owner, name, plant(getattr(owner, name)))
    with pytest.raises(Violation):
        explore(600, phases=(Phase.generate,), **hints)
