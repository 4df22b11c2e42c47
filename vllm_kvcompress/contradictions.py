"""Settings that are each right and together impossible, and the way out of each."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .methods.base import Scorer

if TYPE_CHECKING:
    from .config import KVCompressionConfig

SIZE_KEYS = ("budget", "keep_ratio", "layer_budgets")


def contradictions(config: "KVCompressionConfig") -> Iterator[str]:
    """What two settings together make impossible, a sentence each."""
    yield from _sizes(config)
    yield from _named_again(config)
    yield from _by_head(config)
    yield from _by_layer(config)
    yield from _merged(config)
    yield from _over_time(config)


def _sizes(config: "KVCompressionConfig") -> Iterator[str]:
    sizes = config.model_dump(include=set(SIZE_KEYS), exclude_none=True)
    if sizes and not config.takes_budget:
        yield (
            f"{', '.join(sizes)} cannot be given for {config.method}, whose own "
            "parameters say what is kept; drop it"
        )
    if len(sizes) > 1:
        both = " and ".join(f"{key}={value}" for key, value in sizes.items())
        yield f"{both} exclude each other; give one of them"
    for budget in config.budgets:
        if budget <= config.always_kept:
            yield (
                f"budget={budget} must be larger than the {config.always_kept} "
                f"tokens that {config.method} always keeps"
            )


def _named_again(config: "KVCompressionConfig") -> Iterator[str]:
    own = config.request_methods.get(config.method, config.scorer)
    if own != config.scorer:
        yield (
            f"request_methods.{config.method} has other parameters than the server's "
            "own method; drop it, its name alone means the same"
        )


def _by_head(config: "KVCompressionConfig") -> Iterator[str]:
    for name, scorer in config.request_methods.items():
        if scorer.uneven and name != config.method:
            yield (
                f"request_methods may not hold {name}, which needs rows of its own "
                "for every KV head; make it the server's method"
            )
        if scorer.prunes and config.scorer.uneven:
            yield (
                f"request_methods may not hold {name}, which prunes layers, beside "
                f"method={config.method}; give it prune=false"
            )
    if config.decode and config.decode.scorer.uneven != config.scorer.uneven:
        yield (
            f"decode.method={config.decode.scorer.name} cannot follow method="
            f"{config.method}: KV heads keep equally many tokens with only one of "
            "them; give the same method for both"
        )


def _by_layer(config: "KVCompressionConfig") -> Iterator[str]:
    if config.layers_per_tier and not config.tiered:
        yield (
            f"layers_per_tier={config.layers_per_tier} needs budgets that differ by "
            "layer; drop it, or give layer_budgets"
        )
    generating = config.decode.scorer if config.decode else config.scorer
    if generating.layered and not (generating.owns_budget or config.tiered):
        yield (
            f"decode.method={generating.name}, whose budgets differ by layer, cannot "
            f"follow method={config.method}; give it for both"
        )
    for name, scorer in config.request_methods.items():
        if scorer.layered and not config.tiered:
            yield (
                f"request_methods may not hold {name}, whose budgets differ by "
                f"layer, beside method={config.method}; make it the server's method"
            )


def _merged(config: "KVCompressionConfig") -> Iterator[str]:
    scorer = config.scorer
    if not scorer.merges:
        for own in config.scorers.values():
            if own.merges:
                yield (
                    f"request_methods and decode may not hold {own.name}, which pairs "
                    f"layers, beside method={config.method}; make it the server's "
                    "method"
                )
        return
    for key in ("layer_budgets", "layers_per_tier", "decode"):
        if getattr(config, key):
            yield f"{key} cannot be given for {config.method}; drop it"
    if config.prefill != "exact":
        yield f"prefill={config.prefill!r} cannot be given for {config.method}; drop it"
    others = [("over", getattr(scorer, "over", None))]
    others += [("request_methods", own) for own in config.request_methods.values()]
    for where, other in others:
        if other and other != scorer and not _alike(other):
            yield (
                f"{where}={other.name} does not work with {config.method}, of "
                "which two layers keep the same tokens; use a method like snapkv"
            )


def _alike(scorer: Scorer) -> bool:
    """Whether all layers and KV heads keep equally many tokens."""
    return not (scorer.layered or scorer.uneven or scorer.owns_budget)


def _over_time(config: "KVCompressionConfig") -> Iterator[str]:
    intervals = {}
    decode, scorers = config.decode, config.scorers.values()
    if decode and decode.scorer.generates:
        for key in sorted(decode.model_fields_set - {"scorer"}):
            yield (
                f"decode.{key} cannot be given for {decode.scorer.name}, whose own "
                "parameters say when and what; drop it"
            )
    elif decode and decode.scorer.owns_budget:
        yield (
            f"decode.method={decode.scorer.name} keeps all that is generated with "
            "these parameters; drop decode"
        )
    elif decode:
        intervals["decode.interval"] = decode.interval
    if config.prefill == "incremental":
        intervals["prefill_interval"] = config.prefill_interval
        unbounded = config.keep_ratio or any(scorer.owns_budget for scorer in scorers)
        if decode is None or unbounded:
            yield (
                "prefill='incremental' needs a bounded memory: give decode (such as "
                '{"interval": 128}), and for all methods budget or layer_budgets'
            )
    for key, interval in intervals.items():
        if interval < config.window:
            yield f"{key}={interval} must be at least the window of {config.window}"
