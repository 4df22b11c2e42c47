"""Bugs to plant, each of which the simulator has to find."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from tests.simulator import Worker
from vllm_kvcompress.engine import scheduler
from vllm_kvcompress.engine.course import Course, Planner
from vllm_kvcompress.engine.executor import CompressionExecutor
from vllm_kvcompress.engine.manager import CompressedKVManager
from vllm_kvcompress.engine.observation import ObservationWindow
from vllm_kvcompress.engine.runner import RunnerV1
from vllm_kvcompress.engine.scheduler import CompressedScheduler

Planted = Callable[[Callable[..., Any]], Callable[..., Any]]


def _compact_in_place(_: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, source, count: source[:count]


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


def _tell_of_all_lives(course: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, request: Request) -> Any:
        before = self._usages.get(request.request_id)
        found = course(self, request)
        self._usages[request.request_id] = before or self._usages[request.request_id]
        return found

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


def _prune_all_tiers(compress: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, request: Request, course: Any) -> Any:
        planned = compress(self, request, course)
        return {
            group: replace(do, pruned=course.prune) for group, do in planned.items()
        }

    return planted


def _hash_what_is_pruned(course: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, request: Request) -> Any:
        found = course(self, request)
        if found and found.prune:
            self._exact_tokens.pop(request.request_id, None)
        return found

    return planted


def _forget_decisions(compress: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, request_id: str, *args: Any, **kwargs: Any) -> Any:
        directive = compress(self, request_id, *args, **kwargs)
        if directive:
            self._compressed[request_id].decided = 0
        return directive

    return planted


def _drop_queries(plan: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, scheduled: Any) -> Any:
        found = plan(self, scheduled)
        return replace(found, observed=dict.fromkeys(found.observed, 0))

    return planted


def _count_on_queries_that_passed(next_: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, request: Request, asked: Any, computed: int, *_: Any) -> Any:
        return next_(self, request, asked, computed, computed)

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
PLANTED: dict[str, tuple[Any, str, Planted, dict[str, Any]]] = {
    "compaction in place": (MANAGER, "_private_blocks", _compact_in_place, {}),
    "stolen hash kept": (
        MANAGER,
        "_drop_hashes",
        lambda _: lambda self, private: None,
        {},
    ),
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
    "drafts where a window is": (
        Course,
        "firm",
        lambda _: property(lambda self: self.due),
        {"drafts": 3, "caching": False},
    ),
    "drafts taken for tokens": (
        scheduler,
        "_certain",
        lambda _: lambda request, num_computed_tokens: request.num_tokens_with_spec,
        {"drafts": 3, "decode": True},
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
    "pruned in the lowest tier": (
        SCHEDULER,
        "_compress",
        _prune_all_tiers,
        {"pyramid": True},
    ),
    "pruned KV hashed": (
        SCHEDULER,
        "_course",
        _hash_what_is_pruned,
        {"pyramid": True, "layered": True, "groups": "CC", "caching": True},
    ),
    "decisions forgotten": (
        MANAGER,
        "compress",
        _forget_decisions,
        {"pyramid": True},
    ),
    "told of all lives": (SCHEDULER, "_course", _tell_of_all_lives, {}),
    "queries dropped": (SCHEDULER, "_plan", _drop_queries, {"pyramid": True}),
    "queries passed": (
        Planner,
        "next",
        _count_on_queries_that_passed,
        {"pyramid": True, "runner": "V1", "spare_blocks": 0},
    ),
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
