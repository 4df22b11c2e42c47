"""What has to become of a request, worked out again with plain loops."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.shadow import BLOCK
from vllm_kvcompress.budget import smallest_budget, tier_budgets, whole_block_budgets
from vllm_kvcompress.config import DECODE, KEY, KVCompressionConfig


class Target(NamedTuple):
    """What becomes of one group.

    Attributes:
        end_block: Blocks that are replaced, from the request's start on.
        kept: Blocks that replace them.
        candidates: Held tokens of which some go, None = of all that are replaced.
        merged: How many of the blocks that replace them two groups share.
    """

    end_block: int
    kept: int
    candidates: tuple[int, int] | None = None
    merged: int = 0


@dataclass
class Next:
    """A compression that is still to come.

    Attributes:
        due: It comes with the step that computes the last of so many tokens.
        scorer: Which method rates them.
        window: The last of them, whose queries it sees.
        targets: By group.
        prune: Whether higher layers do not even compute what is dropped.
        late: Whether private blocks were missing when it was due.
    """

    due: int
    scorer: str
    window: int
    targets: dict[int, Target]
    prune: bool
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
        room: Tokens that always find room in one step.
    """

    config: KVCompressionConfig
    tiers: dict[int, tuple[int, ...]]
    prompt: int
    max_tokens: int
    wish: dict[str, Any]
    room: int

    def __post_init__(self) -> None:
        self.replaced = dict.fromkeys(self.tiers, 0)  # blocks, by group
        self.private = dict.fromkeys(self.tiers, 0)
        # By the rule for generated tokens: decided upon so far, blocks that went.
        self.decided = dict.fromkeys(self.tiers, self.prompt)
        self.gone = dict.fromkeys(self.tiers, 0)
        self.merged = dict.fromkeys(self.tiers, 0)  # private blocks of two groups
        layers = sum(len(tier) for tier in set(self.tiers.values()))
        group = {tier[0]: group for group, tier in self.tiers.items()}
        # Group of a deep layer -> of the shallow one, whose blocks it borrows.
        self.owners = {
            group[deep]: group[shallow]
            for shallow, deep in self.config.scorer.layer_pairs(layers)
        }
        wished = self.wish.get(KEY)
        offered = wished in self.config.request_methods
        self.reading = wished if offered else self.config.method
        self.writing = DECODE if self.config.decode else self.reading
        self.next = self._after(0)

    def lost(self, group: int) -> int:
        """Blocks that the request holds less than without compression."""
        return self.replaced[group] - self.private[group]

    def borrowed(self, group: int) -> int:
        """Private blocks that are another group's."""
        return self.merged[group] if group in self.owners else 0

    def planned(self, compression: Next, groups: Iterable[int], computed: int) -> None:
        """With so many tokens computed, some groups are compressed, others later."""
        for group in groups:
            before, target = self.lost(group), compression.targets.pop(group)
            self.replaced[group], self.private[group], candidates, merged = target
            self.merged[group] += merged
            if candidates:
                self.decided[group] = candidates[1] + before * BLOCK
                self.gone[group] += self.lost(group) - before
        compression.late = bool(compression.targets)
        if not compression.late:
            self.next = self._after(computed, compression.due)

    def _dues(self) -> Iterator[tuple[int, int]]:
        """After how many tokens a compression may come; the last is not computed.

        With how often until then another ``gen_interval`` had left the recent ones.
        """
        config, prompt, times = self.config, self.prompt, 0
        widest = max(scorer.needs_queries for scorer in config.scorers.values())
        rule: Any = config.scorers[self.writing]
        end = prompt + self.max_tokens - 1
        if config.scorers[self.reading].prunes:
            end = max(end, prompt + 1)
        for tokens in range(1, end):
            if tokens < prompt:
                whole = tokens % config.prefill_interval == 0
                apart = tokens + widest <= prompt
                fits = config.prefill == "incremental" and whole and apart
            elif tokens > prompt and rule.generates:
                recent = rule.queries_wanted(tokens)
                fits = tokens - recent == prompt + (times + 1) * rule.gen_interval
                times += fits
            elif tokens > prompt and rule.merges:
                fits = rule.interval and (tokens - prompt) % rule.interval == 0
            elif tokens > prompt:
                decode = config.decode
                fits = decode and (tokens - prompt) % decode.interval == 0
            if tokens == prompt or fits:
                yield tokens, times

    def _after(self, computed: int, before: int = 0) -> Next | None:
        """The first compression whose window can be seen, and which helps.

        Args:
            computed: Tokens so far, and
            before: so many when the latest compression was due.
        """
        if self.wish.get(KEY) == "off":
            return None
        for due, times in self._dues():
            scorer = self.writing if due > self.prompt else self.reading
            method = self.config.scorers[scorer]
            later = due > self.prompt
            absorbs, rules = method.merges and later, method.generates and later
            window = 0 if absorbs else method.queries_wanted(due)
            # What its windows have in common is kept, unless the last one was late.
            kept = rules and computed == before
            if due <= computed or (due - window < computed and not kept):
                continue
            if absorbs:
                found = self._absorb(method, due)
            else:
                shed = rules and self._shed(method, due, times)
                found = shed or self._fit(scorer, due)
            targets = {
                group: target
                for group, target in found.items()
                if target.merged or target.end_block - target.kept > self.lost(group)
            }
            if targets:
                prune = method.prunes and due == self.prompt <= self.room
                return Next(due, scorer, window, targets, prune)
        return None

    def _fit(self, scorer: str, due: int) -> dict[int, Target]:
        """What a budget leaves."""
        targets = {}
        for group, budget in self._budgets(scorer).items():
            whole, tail = divmod(due - self.lost(group) * BLOCK, BLOCK)
            kept = min(whole, (budget - tail) // BLOCK)
            targets[group] = Target(whole + self.lost(group), kept)
        method = self.config.scorers[scorer]
        return self._merge(method, targets) if method.merges else targets

    def _merge(self, method: Any, kept: dict[int, Target]) -> dict[int, Target]:
        """The same with all but some blocks merged, in layers that have a partner."""
        targets = dict(kept)
        for group in (*self.owners, *self.owners.values()):
            apart = int(method.retain * kept[group].kept)
            apart = max(apart, 1) if method.retain else 0
            targets[group] = kept[group]._replace(
                merged=max(0, kept[group].kept - apart)
            )
        return targets

    def _absorb(self, method: Any, due: int) -> dict[int, Target]:
        """All whole blocks behind the merged ones; or all, if there are none."""
        targets = {}
        for group in (*self.owners, *self.owners.values()):
            whole, held = due // BLOCK, due // BLOCK - self.lost(group)
            target = Target(whole, held)
            if self.merged[group]:
                behind = (self.private[group] * BLOCK, held * BLOCK)
                target = Target(whole, held, behind, whole - self.replaced[group])
            else:
                target = self._merge(method, dict.fromkeys(self.tiers, target))[group]
            targets[group] = target
        return targets

    def _shed(self, rule: Any, due: int, times: int) -> dict[int, Target]:
        """What the rule for generated tokens leaves, by whole blocks."""
        layers = sum(len(tier) for tier in set(self.tiers.values()))
        recent = due - rule.queries_wanted(due)
        targets = {}
        for group, tier in self.tiers.items():
            lost = 0
            for layer in tier:
                low = (math.cos(math.pi * layer / layers) + 1) / 2
                share = rule.gen_decay_ratio + (1 - rule.gen_decay_ratio) * low
                kept = int(rule.gen_interval * rule.gen_keep_ratio * share)
                lost += times * (rule.gen_interval - max(kept, 1))
            # Only whole blocks are laid out anew, and so decided upon.
            end_block = min(-(-recent // BLOCK), due // BLOCK)
            first, end = self.decided[group], min(recent, end_block * BLOCK)
            go = lost // len(tier) // BLOCK - self.gone[group]
            go = min(go, (end - first) // BLOCK)
            held = self.lost(group)
            candidates = (first - held * BLOCK, end - held * BLOCK)
            targets[group] = Target(end_block, end_block - held - go, candidates)
        return targets

    def _budgets(self, scorer: str) -> dict[int, int]:
        """Tokens per layer that stay in each group; a request asks for less only."""
        config, asked = self.config, self.wish.get(f"{KEY}_budget")
        least = smallest_budget(
            BLOCK, max(method.always_kept for method in config.scorers.values())
        )
        tiers = sorted(set(self.tiers.values()))
        layers = sum(len(tier) for tier in tiers)
        method = config.scorers[scorer]
        if method.merges and method.owns_budget:
            return dict.fromkeys(self.tiers, self.prompt)
        if method.owns_budget:
            by_layer = method.layer_budgets(self.prompt, 0, layers)
            least = method.queries_wanted(self.prompt) + method.always_kept
            whole = whole_block_budgets(by_layer, tiers, self.prompt, least, BLOCK)
            return {group: whole[tier] for group, tier in self.tiers.items()}
        by_layer = list(config.layer_budgets or ())
        if scorer == DECODE and config.decode and config.decode.budget:
            by_layer = [config.decode.budget] * layers
        elif not by_layer:
            budget = config.budget or 0
            if config.keep_ratio:
                budget = max(int(self.prompt * config.keep_ratio), least)
            budget = min(budget, asked or budget)
            by_layer = method.layer_budgets(self.prompt, budget, layers)
        by_layer = [min(budget, asked or budget) for budget in by_layer]
        shared = tier_budgets(by_layer, tiers, least)
        return {group: shared[tier] for group, tier in self.tiers.items()}
