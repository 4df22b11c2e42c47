"""vLLM's scheduler, planning compression.

Everything is decided here, once, for all workers: which requests, when, how many
blocks, and which. A compression is due at a fixed number of tokens, such as the
prompt's; a preempted request is cut at the same places again when it resumes, so
that its second life equals its first.
"""

from collections import Counter
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from ..config import KEY, ConfigError, KVCompressionConfig
from ..plan import Compress, Counters, Report, StepPlan
from . import metrics, usage
from .connectors import bound_loads, hold_emptied
from .course import Course, Planner
from .manager import CompressedKVManager
from .private_blocks import PrivateBlocks
from .requests import asks_for_usage

logger = init_logger("vllm.plugins.kv_compression")


class CompressedScheduler(Scheduler):
    """Scheduler that gives compressed prompts' blocks back to the pool."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._config = KVCompressionConfig.from_dict(
            self.vllm_config.additional_config[KEY]
        )
        coordinator = self.kv_cache_manager.coordinator
        self._managers = {
            group: manager
            for group, manager in enumerate(coordinator.single_type_managers)
            if isinstance(manager, CompressedKVManager)
        }
        if not self._managers:
            raise ConfigError(
                f"{KEY}: no KV cache group of this model can be compressed; "
                "start without --kv-compression"
            )
        self._planner = Planner(self._config, self._managers, self.scheduler_config)
        self._private_blocks = PrivateBlocks(
            self._managers,
            self._planner.owners,
            self.kv_cache_manager.block_pool,
            self.vllm_config.parallel_config.tensor_parallel_size,
        )
        # Request id -> its next compression, None = no more; forgotten with its blocks.
        self._courses: dict[str, Course | None] = {}
        # Request id -> its tokens that saw no compressed context.
        self._exact_tokens: dict[str, int] = {}
        # Of requests that ask to be told.
        self._usages: dict[str, usage.Usage] = {}
        self._skipped: Counter[str] = Counter()
        # Counted since the last statistics message.
        self._unsent = Counters()
        self._hit_limit: int | None = None
        self._guard_prefix_cache()
        if self.connector is not None:
            bound_loads(self.connector, self._most_cached)
            hold_emptied(self, self._private_blocks.give_back)
        self._log_capacity()

    def _guard_prefix_cache(self) -> None:
        """Let a hit leave the window's queries to compute, and hash exact KV only.

        Both per request, and the second in every group: once one group is
        compressed, the layers of all others see the effect.
        """
        coordinator = self.kv_cache_manager.coordinator
        find, cache = coordinator.find_longest_cache_hit, coordinator.cache_blocks

        def find_longest_cache_hit(hashes: Any, max_length: int) -> Any:
            limit = self._hit_limit
            return find(hashes, max_length if limit is None else min(max_length, limit))

        def cache_blocks(request: Request, num_computed_tokens: int) -> None:
            exact = self._exact_tokens.get(request.request_id, num_computed_tokens)
            cache(request, min(num_computed_tokens, exact))

        coordinator.find_longest_cache_hit = find_longest_cache_hit
        coordinator.cache_blocks = cache_blocks

    def _log_capacity(self) -> None:
        length, held, full = self.max_model_len, 0, 0
        for found in self._planner.fits(self._config.method, length).values():
            held += found.own_blocks + bool(found.tail_tokens)
            full += found.end_block + bool(found.tail_tokens)
        logger.info(
            "KV compression %s: %d of %d KV cache groups; a prompt of %d tokens "
            "keeps %d of their %d blocks.",
            self._config.settings(),
            len(self._managers),
            len(self.kv_cache_config.kv_cache_groups),
            length,
            held,
            full,
        )
        if self._config.prefill == "incremental":
            logger.warning(
                "KV compression: long prompts are compressed while they are read "
                "(prefill=incremental). Later parts of a prompt do not see what was "
                "dropped before, so answers differ from those of prefill=exact."
            )

    # Per request -----------------------------------------------------------

    def _course(self, request: Request) -> Course | None:
        """The request's next compression, None if it goes on as it is."""
        request_id = request.request_id
        if request_id not in self._courses:
            settings, reason = self._planner.settings(request)
            course = self._planner.next(request, settings, 0) if settings else None
            self._courses[request_id] = course
            if course and course.prune:
                self._exact_tokens[request_id] = 0
            if course is None and request.num_preemptions == 0:
                self._skipped[reason] += 1
            if asks_for_usage(request.sampling_params):
                chosen = settings.method or self._config.method if settings else None
                skipped = reason if course is None else None
                told = usage.Usage(request, chosen, skipped)
                if before := self._usages.get(request_id):
                    told.waited = before.waited
                self._usages[request_id] = told
        return self._courses[request_id]

    def _free_request_blocks(self, request: Request) -> None:
        self._courses.pop(request.request_id, None)
        self._exact_tokens.pop(request.request_id, None)
        if request.is_finished():  # one that is preempted may yet be answered
            self._usages.pop(request.request_id, None)
        super()._free_request_blocks(request)

    def _most_cached(self, request: Request) -> int | None:
        """How many of its tokens need not be computed, None = all."""
        course = self._course(request)
        if course is None:
            return None
        most = 0 if course.prune else course.firm
        if self.num_spec_tokens:
            # vLLM gives drafts to a chunk of one token, which cannot be cut then.
            most = max(0, min(most, request.num_tokens - 2))
        return most

    # vLLM's steps ----------------------------------------------------------

    def _get_local_prefix_cache_hit(
        self, request: Request, *limits: Any
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        self._hit_limit = self._most_cached(request)
        try:
            return super()._get_local_prefix_cache_hit(request, *limits)
        finally:
            self._hit_limit = None

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """End a chunk where a compression is due, and give the last one the window.

        A window may straddle chunks; in one chunk it costs one copy per layer, and
        a last chunk of one token need not leave the CUDA graphs of decodes.

        Drafts end before the window: a rejected one has a query, too.
        """
        count = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        course = self._course(request) if count > 0 else None
        padded = num_computed_tokens + count > request.num_tokens
        if course is None or (padded and request.status != RequestStatus.RUNNING):
            return count
        missing = course.due - num_computed_tokens
        if missing <= 0:
            # A prompt longer than the KV space may fill it while it waits for private
            # blocks. Token by token it displaces others, until it gets some.
            return 1 if self._config.prefill == "incremental" else count
        end = max(course.firm, _certain(request, num_computed_tokens))
        count = min(count, end - num_computed_tokens)  # 0: until drafts are judged
        if missing <= count:
            return missing
        if course.prune:
            return 0  # until a step has room for all of it
        early = course.window - (missing - count)
        return count - early if 0 < early < count else count

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Free what the last plan emptied, schedule, and plan this step."""
        if self.connector is None:
            self._private_blocks.give_back()
        output = super().schedule(*args, **kwargs)
        self._private_blocks.give_back()
        if plan := self._plan(output.num_scheduled_tokens):
            output.kv_compression = plan
        return output

    def _plan(self, scheduled: dict[str, int]) -> StepPlan:
        observe: dict[str, tuple[int, int]] = {}
        compress: dict[str, dict[int, Compress]] = {}
        observed: dict[str, int] = {}
        for request_id, count in scheduled.items():
            request = self.requests[request_id]
            course = self._course(request)
            if course is None:
                continue
            start, due = request.num_computed_tokens - count, course.due
            end = min(request.num_computed_tokens, _certain(request, start))
            first, last = max(start, due - course.window), min(end, due)
            if first < last:
                observe[request_id] = (first - start, last - start)
            if end >= due:
                if groups := self._compress(request, course):
                    compress[request_id] = groups
                if not course.targets:
                    coming = self._courses[request_id]
                    again = due - (coming.due - coming.window) if coming else 0
                    observed[request_id] = max(0, again)
        skipped, self._skipped = dict(self._skipped), Counter()
        self._unsent.add(Counters(skipped=skipped))
        return StepPlan(observe, compress, observed, skipped)

    def _compress(self, request: Request, course: Course) -> dict[int, Compress]:
        """Plan the groups for which private blocks can be had; retry the rest."""
        scorer = self._config.scorers[course.scorer]
        planned = self._private_blocks.trade(request.request_id, course, scorer)
        if planned:
            self._exact_tokens.setdefault(request.request_id, course.due)
        if told := self._usages.get(request.request_id):
            told.add(planned, dry=bool(course.targets))
        if not course.targets:
            self._courses[request.request_id] = self._planner.next(
                request, course.settings, request.num_computed_tokens, course.due
            )
        elif not course.dry:
            course.dry = True
            self._skipped["pool_dry"] += 1
        return planned

    def update_from_output(
        self,
        scheduler_output: SchedulerOutput,
        model_runner_output: ModelRunnerOutput,
    ) -> dict[int, EngineCoreOutputs]:
        """Check that the plan was executed, then go on as vLLM does."""
        plan: StepPlan | None = getattr(scheduler_output, "kv_compression", None)
        if plan is not None:
            report = getattr(model_runner_output, "kv_compression", Report())
            expected = sum(len(groups) for groups in plan.compress.values())
            if report.compressions != expected:
                raise RuntimeError(
                    f"{KEY}: the worker executed {report.compressions} of "
                    f"{expected} planned compressions"
                )
            self._unsent.add(report)
            for request_id, group, used in self._private_blocks.settle(plan, report):
                if told := self._usages.get(request_id):
                    told.settle(group, used)
        usages = dict(self._usages)  # those who finish now are forgotten
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if usages:
            usage.attach(outputs.values(), usages, self._managers)
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's statistics with ours attached."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            metrics.attach(stats, self._unsent)
        return stats


def _certain(request: Request, num_computed_tokens: int) -> int:
    """Where the tokens end that no rejected draft takes back.

    Args:
        request: It may have a step in flight, whose token is not known yet.
        num_computed_tokens: Where its next step begins, if no draft is rejected.
    """
    return request.num_tokens + (num_computed_tokens == request.num_tokens)


class CompressedAsyncScheduler(CompressedScheduler, AsyncScheduler):
    """The same over vLLM's asynchronous scheduler."""
