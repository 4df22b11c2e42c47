"""Every way to ask for compression folds into one checked configuration.

Users write one flat mapping, whose keys are the common ones below and the method's:
``additional_config={"kv_compression": {"method": "snapkv", "budget": 2048}}``
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, field_validator

from .budget import (
    Fit,
    Tier,
    fit,
    merged,
    paired_tiers,
    prompt_budget,
    smallest_budget,
    tier_budgets,
    tiers,
    whole_block_budgets,
)
from .contradictions import SIZE_KEYS, contradictions
from .decode_config import DecodeConfig, Tokens, decode_config
from .methods.base import Scorer
from .ops.providers import ALL, ProviderName, operations
from .parsing import (
    KEY,
    ConfigError,
    built,
    named_method,
    read_json,
    shown,
    split_method,
)

__all__ = ["KEY", "ConfigError", "DecodeConfig", "KVCompressionConfig"]

DEFAULT_BUDGET = 2048
DECODE = "decode"  # among `KVCompressionConfig.scorers`


class KVCompressionConfig(BaseModel):
    """How the server compresses.

    Attributes:
        scorer: The method with its own parameters.
        budget: Tokens kept per KV head and layer, observation window included.
        keep_ratio: Share of the prompt that is kept, instead of ``budget``.
        layer_budgets: A budget for every compressed layer, the lowest first, instead
            of ``budget``; a list, or the path of a JSON file with one.
        layers_per_tier: Neighbouring layers that share a budget, where budgets
            differ by layer; see `budget.tiers`.
        decode: Compression while a request generates; None = what it generates stays.
        prefill: ``exact`` compresses a prompt when all of it is read;
            ``incremental`` also whenever ``prefill_interval`` more tokens are read, so
            that a prompt may be longer than the KV space.
        prefill_interval: In tokens.
        kernels: A provider for single operations, or for ``all`` of them, which a plain
            name means; else the first that can.
        request_methods: Other methods that a request may choose; a list of names, or
            a mapping from names to parameters.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scorer: SerializeAsAny[Scorer]
    budget: Tokens | None = None
    keep_ratio: float | None = Field(None, gt=0, le=1, strict=True)
    layer_budgets: tuple[Tokens, ...] | None = Field(None, min_length=1)
    layers_per_tier: Tokens | None = None
    decode: DecodeConfig | None = None
    prefill: Literal["exact", "incremental"] = "exact"
    prefill_interval: Tokens = 2048
    kernels: dict[str, ProviderName] = Field(default_factory=dict)
    request_methods: dict[str, SerializeAsAny[Scorer]] = Field(default_factory=dict)

    @field_validator("kernels")
    @classmethod
    def _operations(cls, kernels: dict[str, ProviderName]) -> dict[str, ProviderName]:
        known = [ALL, *sorted(operations())]
        for name in kernels:
            if name not in known:
                raise ValueError(
                    f"names {shown(name)}; allowed keys: {', '.join(known)}"
                )
        return kernels

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "KVCompressionConfig":
        """Check the flat settings that users write.

        Raises:
            ConfigError: Unknown key, wrong type or impossible value.
        """
        common = [key for key in cls.model_fields if key != "scorer"]
        scorer, given = split_method(settings, "", common)
        if isinstance(kernels := given.get("kernels"), str):
            given["kernels"] = {ALL: kernels}
        if isinstance(path := given.get("layer_budgets"), str):
            given["layer_budgets"] = read_json(path)
        if given.get("decode") is not None:
            given["decode"] = decode_config(given["decode"], scorer)
        others = given.get("request_methods", {})
        if isinstance(others, list) and all(isinstance(name, str) for name in others):
            others = {name: {} for name in others}
        if isinstance(others, Mapping):
            given["request_methods"] = {
                name: scorer
                if name == scorer.name and own == {}
                else named_method(name, own, "request_methods.")
                for name, own in others.items()
            }
        config = built(cls, "", scorer=scorer, **given)
        if config.takes_budget and not any(getattr(config, k) for k in SIZE_KEYS):
            config = config.model_copy(update={"budget": DEFAULT_BUDGET})
        for contradiction in contradictions(config):
            raise ConfigError(f"{KEY}: {contradiction}")
        return config

    @property
    def takes_budget(self) -> bool:
        """Whether any method leaves it to the user how much is kept."""
        return not all(scorer.owns_budget for scorer in self.scorers.values())

    @property
    def method(self) -> str:
        """The method's name."""
        return self.scorer.name

    @property
    def scorers(self) -> dict[str, Scorer]:
        """All scorers that a worker may be told to use, by name or `DECODE`."""
        scorers = {**self.request_methods, self.method: self.scorer}
        if self.decode:
            scorers[DECODE] = self.decode.scorer
        return scorers

    @property
    def budgets(self) -> list[int]:
        """All fixed budgets, in tokens per KV head and layer."""
        decode = self.decode.budget if self.decode else None
        given = (self.budget, *(self.layer_budgets or ()), decode)
        return [budget for budget in given if budget is not None]

    @property
    def window(self) -> int:
        """Queries that the most demanding scorer wants to see."""
        return max(scorer.needs_queries for scorer in self.scorers.values())

    @property
    def always_kept(self) -> int:
        """Tokens that the most demanding scorer keeps in any case."""
        return max(scorer.always_kept for scorer in self.scorers.values())

    @property
    def most_tokens(self) -> int | None:
        """The most tokens that a request ever holds per layer, None = all of its own.

        While it is compressed, its new blocks may exist beside the old ones.
        """
        if self.prefill == "exact" or self.decode is None:
            return None
        budget = max(self.budgets)
        if self.tiered and not self.layer_budgets:
            budget *= 2  # no method gives a layer more than twice the mean
        return 2 * budget + max(self.prefill_interval, self.decode.interval)

    @property
    def tiered(self) -> bool:
        """Whether budgets, or heads' shares of them, differ by layer."""
        return self.layer_budgets is not None or self.scorer.layered

    def settings(self) -> dict[str, Any]:
        """The flat settings again, those of the method filled in (JSON types only)."""
        plain = self.model_dump(
            mode="json",
            exclude={"scorer", "decode", "request_methods"},
            exclude_defaults=True,
        )
        settings = {"method": self.method, **plain, **self.scorer.model_dump()}
        if decode := self.decode:
            settings["decode"] = {
                "method": decode.scorer.name,
                **decode.model_dump(
                    exclude={"scorer"}, exclude_unset=True, exclude_none=True
                ),
                **decode.scorer.model_dump(),
            }
        if self.request_methods:
            settings["request_methods"] = {
                name: scorer.model_dump()
                for name, scorer in self.request_methods.items()
            }
        return settings

    def smallest_budget(self, block_size: int) -> int:
        """The least budget that this server can work with."""
        return smallest_budget(block_size, self.always_kept)

    def due(self, method: str, prompt: int, end: int) -> Iterator[tuple[int, str]]:
        """After how many tokens a request is compressed, in ascending order.

        Args:
            method: What compresses its prompt.
            prompt: Length of its prompt.
            end: Tokens that it has in the end; compressing then is of no use.

        Yields:
            A number of tokens, and which of `scorers` rates them.
        """
        last = prompt - max(self.window, 1)
        if self.prefill == "incremental":
            for tokens in range(self.prefill_interval, last + 1, self.prefill_interval):
                yield tokens, method
        if prompt < end or self.scorers[method].prunes:  # then it speeds up the prefill
            yield prompt, method
        generating = DECODE if self.decode else method
        scorer = self.scorers[generating]
        if scorer.generates or scorer.merges:
            times: Iterable[int] = scorer.decisions(prompt, end)
        elif self.decode:
            interval = self.decode.interval
            times = range(prompt + interval, end, interval)
        else:
            times = ()
        for tokens in times:
            yield tokens, generating

    def pairs(self, num_layers: int) -> list[tuple[int, int]]:
        """Layers of which two share one cache, see `Scorer.layer_pairs`.

        Raises:
            ConfigError: There should be some, and are none.
        """
        pairs = self.scorer.layer_pairs(num_layers)
        if not pairs and self.scorer.merges:
            most = num_layers - 2
            way_out = (
                f"give start_layer={most} or less"
                if most >= 0
                else "choose another method"
            )
            raise ConfigError(
                f"{KEY}: {self.method} finds no two layers to merge among "
                f"{num_layers} of this model; {way_out}"
            )
        return pairs

    def tiers(self, num_layers: int) -> list[Tier]:
        """Layers that share a budget, from the bottom.

        Raises:
            ConfigError: Budgets by layer do not fit the model.
        """
        if not self.tiered:
            return [tuple(range(num_layers))]
        if pairs := self.pairs(num_layers):
            return paired_tiers(num_layers, pairs)
        if self.layer_budgets and len(self.layer_budgets) != num_layers:
            raise ConfigError(
                f"{KEY}: layer_budgets has {len(self.layer_budgets)} entries; this "
                f"model has {num_layers} layers to compress, give one for each"
            )
        try:
            return tiers(num_layers, self.layers_per_tier)
        except ValueError as error:
            raise ConfigError(f"{KEY}: {error}") from None

    def prompt_budget(
        self, num_tokens: int, block_size: int, requested: int | None = None
    ) -> int:
        """The budget of one prompt, in the mean of all layers.

        Args:
            num_tokens: Length of the prompt.
            block_size: Tokens per KV block.
            requested: What the request asked for: an upper bound.
        """
        budget = prompt_budget(
            num_tokens,
            budget=self.budget,
            keep_ratio=self.keep_ratio,
            smallest=self.smallest_budget(block_size),
        )
        return budget if requested is None else min(budget, requested)

    def tier_budgets(
        self,
        scorer: str,
        tiers: Sequence[Tier],
        num_tokens: int,
        block_size: int,
        requested: int | None = None,
    ) -> dict[Tier, int]:
        """One request's budgets by tier, in tokens per KV head and layer.

        Args:
            scorer: One of `scorers`.
            tiers: All of `tiers`.
            num_tokens: As in `prompt_budget`.
            block_size: The same.
            requested: The same.
        """
        by_layer: Sequence[int]
        method = self.scorers[scorer]
        layers = sum(map(len, tiers))
        if method.merges and method.owns_budget:
            return dict.fromkeys(tiers, num_tokens)
        if method.owns_budget:
            by_layer = method.layer_budgets(num_tokens, 0, layers)
            least = method.queries_wanted(num_tokens) + method.always_kept
            return whole_block_budgets(by_layer, tiers, num_tokens, least, block_size)
        if scorer == DECODE and self.decode and self.decode.budget:
            by_layer = [self.decode.budget] * layers
        elif self.layer_budgets:
            by_layer = self.layer_budgets
        else:
            budget = self.prompt_budget(num_tokens, block_size, requested)
            by_layer = method.layer_budgets(num_tokens, budget, layers)
        if requested is not None:
            by_layer = [min(budget, requested) for budget in by_layer]
        return tier_budgets(by_layer, tiers, self.smallest_budget(block_size))

    def tier_fits(
        self,
        scorer: str,
        tiers: Sequence[Tier],
        num_tokens: int,
        block_size: int,
    ) -> dict[Tier, Fit]:
        """What becomes of one prompt in every tier; see `tier_budgets`."""
        budgets = self.tier_budgets(scorer, tiers, num_tokens, block_size)
        fits = {tier: fit(num_tokens, budgets[tier], block_size) for tier in tiers}
        method = self.scorers[scorer]
        for pair in method.layer_pairs(sum(map(len, tiers))):
            for layer, borrows in zip(pair, (False, True), strict=True):
                tier = next(tier for tier in tiers if layer in tier)
                fits[tier] = merged(fits[tier], method.retained_share, borrows)
        return fits
