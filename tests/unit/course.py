"""What has to become of a request, worked out again with plain loops."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.simulator import BLOCK
from vllm_kvcompress.budget import smallest_budget, tier_budgets
from vllm_kvcompress.config import DECODE, KEY, KVCompressionConfig


@dataclass
class Next:
    """A compression that is still to come.

    Attributes:
        due: It comes with the step that computes the last of so many tokens.
        scorer: Which method rates them.
        window: The last of them, whose queries it sees.
        targets: Group -> blocks replaced from the request's start on, private blocks.
        late: Whether private blocks were missing when it was due.
    """

    due: int
    scorer: str
    window: int
    targets: dict[int, tuple[int, int]]
    late: bool = False


@dataclass
class Course:
    """One request, from an admission until it is removed.

    Attributes:
        config: Of the server.
        tiers: Group -> the layers that share its budget.
        prompt: Its length.
        max_tokens: As the request asks.
        wish: The request's own settings.
    """

    config: KVCompressionConfig
    tiers: dict[int, tuple[int, ...]]
    prompt: int
    max_tokens: int
    wish: dict[str, Any]

    def __post_init__(self) -> None:
        self.replaced = dict.fromkeys(self.tiers, 0)  # blocks, by group
        self.private = dict.fromkeys(self.tiers, 0)
        self.next = self._after(0)

    def lost(self, group: int) -> int:
        """Blocks that the request holds less than without compression."""
        return self.replaced[group] - self.private[group]

    def planned(self, compression: Next, groups: Iterable[int], computed: int) -> None:
        """With so many tokens computed, some groups are compressed, others later."""
        for group in groups:
            self.replaced[group], self.private[group] = compression.targets.pop(group)
        compression.late = bool(compression.targets)
        if not compression.late:
            self.next = self._after(computed)

    def _dues(self) -> Iterator[int]:
        """After how many tokens a compression may come; the last is not computed."""
        config, prompt = self.config, self.prompt
        widest = max(scorer.needs_queries for scorer in config.scorers.values())
        for tokens in range(1, prompt + self.max_tokens - 1):
            if tokens < prompt:
                whole = tokens % config.prefill_interval == 0
                apart = tokens + widest <= prompt
                fits = config.prefill == "incremental" and whole and apart
            elif tokens > prompt:
                decode = config.decode
                fits = decode and (tokens - prompt) % decode.interval == 0
            if tokens == prompt or fits:
                yield tokens

    def _after(self, computed: int) -> Next | None:
        """The first compression whose window is still to come, and which helps."""
        if self.wish.get(KEY) == "off":
            return None
        for due in self._dues():
            name = self.wish.get(KEY)
            scorer = name if name in self.config.request_methods else self.config.method
            if due > self.prompt:
                scorer = DECODE
            window = self.config.scorers[scorer].needs_queries
            if due - window < computed or due == computed:
                continue
            targets = {}
            for group, budget in self._budgets(scorer).items():
                whole, tail = divmod(due - self.lost(group) * BLOCK, BLOCK)
                kept = (budget - tail) // BLOCK
                if kept < whole:
                    targets[group] = (whole + self.lost(group), kept)
            if targets:
                return Next(due, scorer, window, targets)
        return None

    def _budgets(self, scorer: str) -> dict[int, int]:
        """Tokens per layer that stay in each group; a request asks for less only."""
        config, asked = self.config, self.wish.get(f"{KEY}_budget")
        least = smallest_budget(
            BLOCK, max(method.always_kept for method in config.scorers.values())
        )
        tiers = sorted(set(self.tiers.values()))
        layers = sum(len(tier) for tier in tiers)
        by_layer = list(config.layer_budgets or ())
        if scorer == DECODE and config.decode and config.decode.budget:
            by_layer = [config.decode.budget] * layers
        elif not by_layer:
            budget = config.budget or 0
            if config.keep_ratio:
                budget = max(int(self.prompt * config.keep_ratio), least)
            budget = min(budget, asked or budget)
            method = config.scorers[scorer]
            by_layer = method.layer_budgets(self.prompt, budget, layers)
        by_layer = [min(budget, asked or budget) for budget in by_layer]
        shared = tier_budgets(by_layer, tiers, least)
        return {group: shared[tier] for group, tier in self.tiers.items()}
