"""Which methods can be planned for a model, and why others cannot."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...config import ConfigError, KVCompressionConfig
from ...contradictions import SIZE_KEYS
from ...methods import load_method
from ...parsing import KEY
from ...prunable import prunable
from ..errors import ToolError
from .model import ModelKV
from .pool import FORMATS, Pool


@dataclass(frozen=True)
class Option:
    """A method with its settings and what requests then hold.

    Attributes:
        method: Its name.
        budget: Tokens per KV head and layer, None = the method or settings say it.
        pool: See there.
    """

    method: str
    budget: int | None
    pool: Pool


def options(
    stock: Pool,
    methods: Sequence[str],
    budgets: Sequence[int],
    settings: Mapping[str, Any],
) -> tuple[list[Option], dict[str, str]]:
    """Build what can be planned.

    Args:
        stock: The pool without compression.
        methods: Names of methods.
        budgets: One each, where a method takes a budget and ``settings`` has none.
        settings: For all methods.

    Returns:
        The options, and by method why there are none.

    Raises:
        ToolError: The settings fit none of the methods.
    """
    found: list[Option] = []
    refused: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for method in methods:
        for budget in _budgets(method, budgets, settings):
            size = {} if budget is None else {"budget": budget}
            try:
                given = {**settings, "method": method, **size}
                config = KVCompressionConfig.from_dict(given)
            except ConfigError as error:
                wrong[method] = refused[method] = str(error).removeprefix(f"{KEY}: ")
                continue
            pool = replace(stock, config=config)
            if reason := refusal(pool, config):
                refused[method] = reason
            else:
                found.append(Option(method, budget, pool))
    if len(wrong) == len(methods):
        raise ToolError(next(iter(wrong.values())))
    return found, refused


def _budgets(
    method: str, budgets: Sequence[int], settings: Mapping[str, Any]
) -> Sequence[int | None]:
    if any(key in settings for key in SIZE_KEYS):
        return [None]
    names = load_method(method).model_fields
    own = {key: value for key, value in settings.items() if key in names}
    try:
        config = KVCompressionConfig.from_dict({**own, "method": method})
    except ConfigError:
        return [None]  # said when all settings are checked
    return budgets if config.takes_budget else [None]


def refusal(pool: Pool, config: KVCompressionConfig) -> str | None:
    """Why a method cannot be used with a model, None if it can.

    As `engine.enable` and `engine.layers` have it, which only start with vLLM.
    """
    return next(_refusals(pool, pool.model, config), None)


def _refusals(pool: Pool, model: ModelKV, config: KVCompressionConfig) -> Iterator[str]:
    if model.refusal:
        yield model.refusal
    bits, scaled = FORMATS[pool.dtype]
    scorers = config.scorers.values()
    merges_all = config.scorer.merges and config.scorer.owns_budget
    uneven = any(scorer.uneven for scorer in scorers)
    if (bits == 4 and not merges_all) or (scaled and uneven):
        yield f"--kv-cache-dtype {pool.dtype} does not work with it"
    prunes = any(scorer.prunes for scorer in scorers)
    if prunes and not prunable(model.architecture, model.part):
        way_out = "--config '{\"prune\": false}'"
        yield f"it cannot prune {model.architecture}; give {way_out}"
    try:
        pairs = config.pairs(len(model.full))
        config.tiers(len(model.full))
    except ConfigError as error:
        yield str(error).removeprefix(f"{KEY}: ")
        return
    for shallow, deep in ((model.full[a], model.full[b]) for a, b in pairs):
        if deep.index - shallow.index != 1 or shallow.kv_heads != deep.kv_heads:
            yield "its pairs would be no neighbours with KV of one shape"
        if shallow.shared or deep.shared:
            yield "it cannot merge layers whose KV others read too"
    if pool.batched_tokens < config.window:
        yield f"its window of {config.window} needs more --max-num-batched-tokens"
    block_size = next(b.block_size for b in pool.buckets if b.tier)
    smallest = config.smallest_budget(block_size)
    if min(config.budgets, default=smallest) < smallest:
        yield f"with blocks of {block_size} tokens its budget is at least {smallest}"
