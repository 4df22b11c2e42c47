"""When a request is compressed next, and down to what.

That depends on the request alone, not on chunks, neighbours or preemptions, so that
its second life equals its first.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from vllm.config import SchedulerConfig
from vllm.logger import init_logger
from vllm.v1.request import Request

from ..budget import Fit, merged
from ..config import KVCompressionConfig
from ..methods.base import Scorer
from .manager import CompressedKVManager
from .requests import RequestSettings, request_settings

logger = init_logger("vllm.plugins.kv_compression")


@dataclass
class Course:
    """A request's next compression.

    Attributes:
        settings: What the request asked for.
        scorer: Which of `KVCompressionConfig.scorers` rates the tokens.
        window: Queries that it wants to see.
        due: It comes after the step that computes the last of so many tokens.
        targets: What is to be kept, in the groups that still wait for it.
        prune: Whether dropped tokens are not even computed in higher layers.
        dry: Whether private blocks were missing.
    """

    settings: RequestSettings
    scorer: str
    window: int
    due: int
    targets: dict[int, Fit]
    prune: bool = False
    dry: bool = False

    @property
    def firm(self) -> int:
        """Tokens from here on must be computed, and only once, before it is due."""
        return self.due - max(self.window, 1)


class Planner:
    """Works out the courses of requests on one engine."""

    def __init__(
        self,
        config: KVCompressionConfig,
        managers: Mapping[int, CompressedKVManager],
        scheduler_config: SchedulerConfig,
    ) -> None:
        self._config, self._managers = config, managers
        self._scheduler_config = scheduler_config
        # Layers alike but for their tier have pages, and so blocks, of one size.
        self._block_size = next(iter(managers.values())).block_size
        self._tiers = sorted({m.kv_cache_spec.tier for m in managers.values()})
        self._layers = sum(map(len, self._tiers))
        # Deep group -> the group whose blocks it borrows.
        self.owners = self._owners()

    def _owners(self) -> dict[int, int]:
        pairs = self._config.scorer.layer_pairs(self._layers)
        groups: list[list[int]] = [[], []]
        for group, manager in self._managers.items():
            first = manager.kv_cache_spec.tier[0]
            for role in (0, 1):
                if first in {pair[role] for pair in pairs}:
                    groups[role].append(group)
        # vLLM splits tiers of a kind alike, and in the same order.
        shallow, deep = groups
        return dict(zip(deep, shallow, strict=True))

    def budgets(
        self, scorer: str, prompt: int, requested: int | None = None
    ) -> dict[int, int]:
        """A request's budgets by group, in tokens per KV head and layer."""
        by_tier = self._config.tier_budgets(
            scorer, self._tiers, prompt, self._block_size, requested
        )
        return {
            group: by_tier[manager.kv_cache_spec.tier]
            for group, manager in self._managers.items()
        }

    def fits(self, scorer: str, prompt: int) -> dict[int, Fit]:
        """What becomes of a prompt that is compressed at once, by group."""
        by_tier = self._config.tier_fits(scorer, self._tiers, prompt, self._block_size)
        return {
            group: by_tier[manager.kv_cache_spec.tier]
            for group, manager in self._managers.items()
        }

    def settings(self, request: Request) -> tuple[RequestSettings | None, str]:
        """What the request asks for, and why nothing may come of it."""
        params = request.sampling_params
        if params is None or request.resumable:
            return None, "session"
        try:
            settings = request_settings(
                params.extra_args, self._config, self._block_size
            )
        except ValueError:
            # The front end answers these with an error; an engine lives on.
            return None, "invalid"
        if not settings.enabled:
            return None, "off"
        return settings, "one_token" if request.max_tokens == 1 else "short"

    def next(
        self,
        request: Request,
        settings: RequestSettings,
        computed: int,
        observed: int = 0,
    ) -> Course | None:
        """The first compression after ``computed`` tokens that frees a block.

        Args:
            request: It is compressed,
            settings: as it asked for.
            computed: Its tokens so far.
            observed: Where the queries kept of them end: a late compression has let
                those behind it pass.
        """
        prompt = request.num_prompt_tokens
        end = prompt + request.max_tokens - 1
        method = settings.method or self._config.method
        for due, name in self._config.due(method, prompt, end):
            scorer = self._config.scorers[name]
            window = scorer.queries_wanted(due)
            if due > prompt and scorer.merges:
                if due <= computed:
                    continue
                window, targets = 0, self._absorb(request, scorer, due)
            elif due > prompt and scorer.generates:
                missed = observed != computed and due - window < computed
                if due <= computed or missed:
                    continue
                targets = self._shed(request, scorer, due)
            else:
                if due - max(window, 1) < computed:
                    continue
                budgets = self.budgets(name, prompt, settings.budget)
                targets = {
                    group: manager.fit(request.request_id, due, budgets[group])
                    for group, manager in self._managers.items()
                }
                if scorer.merges:
                    targets |= self._merged(targets, scorer)
            targets = {group: fit for group, fit in targets.items() if fit.shrinks}
            if targets:
                prune = scorer.prunes and due == prompt and self._prunable(request)
                return Course(settings, name, window, due, targets, prune)
        return None

    def _merged(self, kept: dict[int, Fit], scorer: Scorer) -> dict[int, Fit]:
        """The pairs' part of what is to be kept."""
        return {
            group: merged(kept[group], scorer.retained_share, group in self.owners)
            for pair in self.owners.items()
            for group in pair
        }

    def _absorb(self, request: Request, scorer: Scorer, due: int) -> dict[int, Fit]:
        """What is to be kept where generated tokens merge, too; no others go."""
        targets = {}
        for pair in self.owners.items():
            for group in pair:
                manager, borrows = self._managers[group], group in self.owners
                if manager.merges(request.request_id):
                    targets[group] = manager.absorb(request.request_id, due, borrows)
                else:
                    kept = manager.fit(request.request_id, due, due)
                    targets[group] = merged(kept, scorer.retained_share, borrows)
        return targets

    def _shed(self, request: Request, scorer: Scorer, due: int) -> dict[int, Fit]:
        """What is to be kept where a method rules what a request generates."""
        prompt = request.num_prompt_tokens
        lost = scorer.generated_lost(prompt, due, self._layers)
        recent = due - scorer.queries_wanted(due)
        targets = {}
        for group, manager in self._managers.items():
            tier = manager.kv_cache_spec.tier
            mean = sum(lost[layer] for layer in tier) // len(tier)
            targets[group] = manager.shed(request.request_id, due, prompt, recent, mean)
        return targets

    def _prunable(self, request: Request) -> bool:
        """Whether a prompt always finds room in one step; all of it has to."""
        config = self._scheduler_config
        room = config.max_num_batched_tokens - config.max_num_seqs
        room = min(room, config.long_prefill_token_threshold or room)
        params = request.sampling_params
        if request.num_prompt_tokens > room:
            logger.warning_once(
                "KV compression: a prompt is longer than the %d tokens that always fit "
                "into one step, so it is not pruned: each layer drops KV by its own "
                "attention, another approximation. Raise --max-num-batched-tokens.",
                room,
            )
            return False
        return params is not None and params.prompt_logprobs is None
