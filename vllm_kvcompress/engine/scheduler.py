"""vLLM's scheduler, planning compression.

Everything is decided here, once, for all workers: which requests, when, how many
blocks, and which. A prompt is compressed after the step that computes its last
token; a preempted request is cut at that same place again when it resumes, so
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
from vllm.v1.request import Request

from ..budget import fit
from ..config import KEY, ConfigError, KVCompressionConfig
from ..plan import Compress, Counters, StepPlan
from . import metrics
from .manager import CompressedKVManager
from .requests import request_settings

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
        self._window = self._config.scorer.needs_queries
        # Request id -> its budget, 0 = stays as it is; forgotten with its blocks.
        self._budgets: dict[str, int] = {}
        # Request id -> groups that are still to be compressed.
        self._open: dict[str, set[int]] = {}
        # Requests for which no private block could be had yet.
        self._dry: set[str] = set()
        # Request id -> its tokens that saw no compressed context.
        self._exact_tokens: dict[str, int] = {}
        self._skipped: Counter[str] = Counter()
        # Counted since the last statistics message.
        self._unsent = Counters()
        self._hit_limit: int | None = None
        self._guard_prefix_cache()
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
        block_size = self._block_size(next(iter(self._managers)))
        length = self.max_model_len
        budget = self._config.prompt_budget(length, block_size)
        kept = fit(length, budget, block_size)
        logger.info(
            "KV compression %s: %d of %d KV cache groups; a prompt of %d tokens "
            "keeps %d blocks of %d tokens per group instead of %d.",
            self._config.settings(),
            len(self._managers),
            len(self.kv_cache_config.kv_cache_groups),
            length,
            kept.kept_blocks + bool(kept.tail_tokens),
            block_size,
            -(-length // block_size),
        )

    def _block_size(self, group: int) -> int:
        return self._managers[group].block_size

    # Per request -----------------------------------------------------------

    def _budget(self, request: Request) -> int:
        """The request's budget in tokens, 0 if it stays as it is."""
        budget = self._budgets.get(request.request_id)
        if budget is None:
            budget, reason = self._decide(request)
            self._budgets[request.request_id] = budget
            if budget:
                self._open[request.request_id] = set(self._managers)
            elif request.num_preemptions == 0:
                self._skipped[reason] += 1
        return budget

    def _decide(self, request: Request) -> tuple[int, str]:
        params = request.sampling_params
        if params is None or request.resumable:
            return 0, "session"
        block_size = self._block_size(next(iter(self._managers)))
        try:
            settings = request_settings(params.extra_args, self._config, block_size)
        except ValueError:
            # The front end answers these with an error; an engine lives on.
            return 0, "invalid"
        if not settings.enabled:
            return 0, "off"
        if params.max_tokens == 1:
            return 0, "one_token"
        prompt = request.num_prompt_tokens
        budget = self._config.prompt_budget(prompt, block_size, settings.budget)
        if not any(
            fit(prompt, budget, self._block_size(group)).shrinks
            for group in self._managers
        ):
            return 0, "short"
        return budget, ""

    def _free_request_blocks(self, request: Request) -> None:
        self._budgets.pop(request.request_id, None)
        self._open.pop(request.request_id, None)
        self._exact_tokens.pop(request.request_id, None)
        self._dry.discard(request.request_id)
        super()._free_request_blocks(request)

    # vLLM's steps ----------------------------------------------------------

    def _get_local_prefix_cache_hit(
        self, request: Request
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        if self._budget(request):
            self._hit_limit = request.num_prompt_tokens - max(self._window, 1)
        try:
            return super()._get_local_prefix_cache_hit(request)
        finally:
            self._hit_limit = None

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """End a chunk at the prompt's end, and give the last one the window.

        A window may straddle chunks; in one chunk it costs one copy per layer, and
        a last chunk of one token need not leave the CUDA graphs of decodes.
        """
        count = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        to_prompt_end = request.num_prompt_tokens - num_computed_tokens
        if to_prompt_end <= 0 or count <= 0 or not self._budget(request):
            return count
        remaining = to_prompt_end - count
        if remaining <= 0:
            return to_prompt_end
        missing = self._window - remaining
        return count - missing if 0 < missing < count else count

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Free what the last plan emptied, schedule, and plan this step."""
        for manager in self._managers.values():
            self.kv_cache_manager.block_pool.free_blocks(manager.take_pending())
        output = super().schedule(*args, **kwargs)
        if plan := self._plan(output.num_scheduled_tokens):
            output.kv_compression = plan
        return output

    def _plan(self, scheduled: dict[str, int]) -> StepPlan:
        observe: dict[str, tuple[int, int]] = {}
        compress: dict[str, dict[int, Compress]] = {}
        for request_id, count in scheduled.items():
            if request_id in self._budgets and request_id not in self._open:
                continue
            request = self.requests[request_id]
            if not self._budget(request):
                continue
            prompt, end = request.num_prompt_tokens, request.num_computed_tokens
            start = end - count
            first, last = max(start, prompt - self._window), min(end, prompt)
            if first < last:
                observe[request_id] = (first - start, last - start)
            if end >= prompt and (groups := self._compress(request)):
                compress[request_id] = groups
        skipped, self._skipped = dict(self._skipped), Counter()
        self._unsent.add(Counters(skipped=skipped))
        return StepPlan(observe, compress, skipped)

    def _compress(self, request: Request) -> dict[int, Compress]:
        """Plan the groups for which private blocks can be had; retry the rest."""
        request_id, prompt = request.request_id, request.num_prompt_tokens
        open_groups = self._open[request_id]
        planned: dict[int, Compress] = {}
        for group in sorted(open_groups):
            manager = self._managers[group]
            target = fit(prompt, self._budgets[request_id], manager.block_size)
            if target.shrinks:
                directive = manager.compress(request_id, target, prompt)
                if directive is None:
                    if request_id not in self._dry:
                        self._dry.add(request_id)
                        self._skipped["pool_dry"] += 1
                    continue
                planned[group] = directive
            open_groups.discard(group)
        if planned:
            self._exact_tokens.setdefault(request_id, request.num_computed_tokens)
        if not open_groups:
            del self._open[request_id]
        return planned

    def update_from_output(
        self,
        scheduler_output: SchedulerOutput,
        model_runner_output: ModelRunnerOutput,
    ) -> dict[int, EngineCoreOutputs]:
        """Check that the plan was executed, then go on as vLLM does."""
        plan: StepPlan | None = getattr(scheduler_output, "kv_compression", None)
        if plan is not None:
            report = getattr(model_runner_output, "kv_compression", Counters())
            expected = sum(len(groups) for groups in plan.compress.values())
            if report.compressions != expected:
                raise RuntimeError(
                    f"{KEY}: the worker executed {report.compressions} of "
                    f"{expected} planned compressions"
                )
            self._unsent.add(report)
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's statistics with ours attached."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            metrics.attach(stats, self._unsent)
        return stats


class CompressedAsyncScheduler(CompressedScheduler, AsyncScheduler):
    """The same over vLLM's asynchronous scheduler."""
