"""The scheduler and its workers keep the design's invariants under any workload.

Hypothesis thinks of the workloads, and bugs that are planted on purpose show that the
checks of `Run` find them.
"""

import os
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
pytest.importorskip("vllm")

from hypothesis import HealthCheck, Phase, given, seed, settings
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from tests.simulator import Violation, Worker
from tests.unit.simulation import Run
from tests.unit.workloads import RUNNERS, Arrival, Workload, workloads
from vllm_kvcompress import methods
from vllm_kvcompress.engine.course import Planner
from vllm_kvcompress.engine.executor import CompressionExecutor, ObservationWindow
from vllm_kvcompress.engine.manager import CompressedKVManager
from vllm_kvcompress.engine.runner import RunnerV1
from vllm_kvcompress.engine.scheduler import CompressedScheduler

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
    seen = explore(200, number, runner=runner)
    assert all(seen[what] for what in HAPPENS), seen


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


Planted = Callable[[Callable[..., Any]], Callable[..., Any]]


def _compact_in_place(_: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, source, count: source[:count]


def _keep_stolen_hashes(_: Callable[..., Any]) -> Callable[..., Any]:
    def private_blocks(self: Any, source: list[Any], count: int) -> list[Any] | None:
        own = [block for block in source if block.ref_cnt == 1]
        fresh = min(count, self.block_pool.get_num_free_blocks())
        if count - fresh > len(own):
            return None
        return own[: count - fresh] + self.block_pool.get_new_blocks(fresh)

    return private_blocks


def _free_at_planning(compress: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, *args: Any, **kwargs: Any) -> Any:
        directive = compress(self, *args, **kwargs)
        self.block_pool.free_blocks(self.take_pending())
        return directive

    return planted


def _former(self: Any, request_id: str, compress: Callable[[], Any]) -> Any:
    """Compress, and take the private blocks that are left over off the request."""
    state = self._compressed.get(request_id)
    before = list(state.destination) if state else []
    directive = compress()
    former = [block for block in before if block in state.pending] if state else []
    if state:
        state.pending = [block for block in state.pending if block not in former]
    return directive, former


def _forget_former_blocks(compress: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, request_id: str, *args: Any, **kwargs: Any) -> Any:
        again = partial(compress, self, request_id, *args, **kwargs)
        return _former(self, request_id, again)[0]

    return planted


def _free_former_blocks(compress: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, request_id: str, *args: Any, **kwargs: Any) -> Any:
        again = partial(compress, self, request_id, *args, **kwargs)
        directive, former = _former(self, request_id, again)
        self.block_pool.free_blocks(former)
        return directive

    return planted


def _lose_private_blocks(_: Callable[..., Any]) -> Callable[..., Any]:
    def pop_blocks_for_free(self: Any, request_id: str) -> list[Any]:
        self._compressed.pop(request_id, None)
        return FullAttentionManager.pop_blocks_for_free(self, request_id)

    return pop_blocks_for_free


def _hash_approximate(compress: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, request: Request, course: Any) -> Any:
        planned = compress(self, request, course)
        self._exact_tokens.clear()
        return planned

    return planted


def _hash_what_a_late_group_sees(compress: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, request: Request, course: Any) -> Any:
        if planned := compress(self, request, course):
            self._exact_tokens[request.request_id] = request.num_computed_tokens
        return planned

    return planted


def _hash_in_sliding_groups(guard: Callable[..., Any]) -> Callable[..., Any]:
    def uncapped(cache_blocks: Callable[..., Any]) -> Callable[..., Any]:
        return lambda request, _, *args, **kwargs: cache_blocks(
            request, min(request.num_tokens, request.num_computed_tokens), **kwargs
        )

    def planted(self: Any) -> None:
        guard(self)
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if not isinstance(manager, CompressedKVManager):
                manager.cache_blocks = uncapped(manager.cache_blocks)

    return planted


def _do_not_cut_again(reserve: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, request: Request, *args: Any) -> int:
        if request.num_preemptions:
            return Scheduler._reserve_prefill_lookahead(self, request, *args)
        return reserve(self, request, *args)

    return planted


def _cross(reserve: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, request: Request, computed: int, count: int) -> int:
        course = self._course(request)
        if course and course.due != request.num_prompt_tokens:
            return count
        return reserve(self, request, computed, count)

    return planted


def _do_not_retry(compress: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, request: Request, course: Any) -> Any:
        planned = compress(self, request, course)
        course.targets.clear()
        return planned

    return planted


def _take_answer_for_prompt(next_: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, request: Request, *args: Any) -> Any:
        if request.num_preemptions:
            again = dict(num_prompt_tokens=request.num_tokens)
            request = SimpleNamespace(**{**vars(request), **again})
        return next_(self, request, *args)

    return planted


def _mix_up_tiers(budgets: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, *args: Any) -> dict[int, int]:
        found = budgets(self, *args)
        return dict(zip(found, reversed(found.values()), strict=True))

    return planted


def _read_from_the_start(finish: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, read_row: Any, write_row: Any) -> Any:
        return finish(self, lambda g, r, _, end: read_row(g, r, 0, end), write_row)

    return planted


def _keep_windows(_: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, request_id, count: None


def _keep_preempted_rows(_: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, out: SchedulerOutput) -> None:
        for request_id in out.finished_req_ids:
            self.compression.forget(request_id)
        Worker._update_states(self, out)

    return planted


def _keep_rows(_: Callable[..., Any]) -> Callable[..., Any]:
    def forget(self: Any, request_id: str) -> None:
        for window in self._windows:
            window.queries.pop(request_id, None)

    return forget


MANAGER, SCHEDULER = CompressedKVManager, CompressedScheduler
EXECUTOR = CompressionExecutor
# What goes wrong -> where it is planted, and where to look first.
PLANTED: dict[str, tuple[type, str, Planted, dict[str, Any]]] = {
    "compaction in place": (MANAGER, "_private_blocks", _compact_in_place, {}),
    "stolen hash kept": (MANAGER, "_private_blocks", _keep_stolen_hashes, {}),
    "freed at planning": (MANAGER, "compress", _free_at_planning, {}),
    "former private blocks leak": (
        MANAGER,
        "compress",
        _forget_former_blocks,
        {"decode": True},
    ),
    "former private blocks freed at once": (
        MANAGER,
        "compress",
        _free_former_blocks,
        {"decode": True},
    ),
    "never freed": (MANAGER, "take_pending", lambda _: lambda self: [], {}),
    "private lost": (MANAGER, "pop_blocks_for_free", _lose_private_blocks, {}),
    "approximate KV hashed": (SCHEDULER, "_compress", _hash_approximate, {}),
    "hashed by a late group": (
        SCHEDULER,
        "_compress",
        _hash_what_a_late_group_sees,
        {"groups": "CC", "caching": True, "spare_blocks": 0},
    ),
    "hashed in sliding groups": (
        SCHEDULER,
        "_guard_prefix_cache",
        _hash_in_sliding_groups,
        {"groups": "CW"},
    ),
    "window starved by a hit": (
        SCHEDULER,
        "_get_local_prefix_cache_hit",
        lambda _: Scheduler._get_local_prefix_cache_hit,
        {},
    ),
    "resumed prompt not cut": (
        SCHEDULER,
        "_reserve_prefill_lookahead",
        _do_not_cut_again,
        {},
    ),
    "chunk crosses": (
        SCHEDULER,
        "_reserve_prefill_lookahead",
        _cross,
        {"incremental": True},
    ),
    "no retry": (
        SCHEDULER,
        "_compress",
        _do_not_retry,
        {"caching": True, "spare_blocks": 0},
    ),
    "answer taken for a prompt": (
        Planner,
        "next",
        _take_answer_for_prompt,
        {"decode": True},
    ),
    "tiers mixed up": (Planner, "budgets", _mix_up_tiers, {"layered": True}),
    "source read from the start": (
        EXECUTOR,
        "finish_step",
        _read_from_the_start,
        {"decode": True},
    ),
    "windows pile up": (
        ObservationWindow,
        "keep",
        _keep_windows,
        {"layered": True},
    ),
    "V1 keeps a preempted row": (
        RunnerV1,
        "_update_states",
        _keep_preempted_rows,
        {"runner": "V1"},
    ),
    "V2 keeps rows": (EXECUTOR, "forget", _keep_rows, {"runner": "V2"}),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_simulator_finds_planted_bugs(
    bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, plant, hints = PLANTED[bug]
    monkeypatch.setattr(owner, name, plant(getattr(owner, name)))
    with pytest.raises(Violation):
        explore(600, phases=(Phase.generate,), **hints)
