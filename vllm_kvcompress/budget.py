"""How much memory a compressed prompt holds: lengths only, no tensors.

A prompt of n tokens fills ``n // block_size`` whole blocks and a tail. The tail
stays where it is; of the whole blocks' tokens as many are kept, in as few private
blocks, as the budget leaves room for. So the kept tokens number at most the
budget, and are congruent to n modulo the block size: slots stay logical.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

Tier = tuple[int, ...]  # numbers of layers

MAX_TIERS = 8


@dataclass(frozen=True)
class Fit:
    """What becomes of one prompt in one KV cache group.

    Attributes:
        end_block: Logical blocks ``[0, end_block)`` are replaced.
        kept_blocks: Private blocks that replace them.
        tail_tokens: Tokens behind them, kept as they are.
        candidates: ``(first, end)`` of the tokens of which some go, None = of all in
            replaced blocks. Whole blocks in front stay, and count as kept.
        merged_blocks: Of the kept blocks, behind those that stay, so many hold tokens
            merged with those of other layers.
        borrows: Whether these blocks are the other layers'.
    """

    end_block: int
    kept_blocks: int
    tail_tokens: int
    candidates: tuple[int, int] | None = None
    merged_blocks: int = 0
    borrows: bool = False

    @property
    def own_blocks(self) -> int:
        """Private blocks that are taken from the pool."""
        return self.kept_blocks - self.borrows * self.merged_blocks

    @property
    def freed_blocks(self) -> int:
        """Blocks that go back to the pool."""
        return self.end_block - self.own_blocks

    @property
    def shrinks(self) -> bool:
        """Whether compressing frees at least one block."""
        return self.freed_blocks + self.merged_blocks > 0


def fit(num_tokens: int, budget: int, block_size: int) -> Fit:
    """Lay a prompt of ``num_tokens`` into at most ``budget`` tokens per KV head."""
    end_block, tail = divmod(num_tokens, block_size)
    return Fit(end_block, min(end_block, max(0, budget - tail) // block_size), tail)


def shed(held: int, first: int, end: int, blocks: int, block_size: int) -> Fit:
    """Lay out ``held`` tokens after some of ``[first, end)`` have gone.

    Args:
        held: Tokens per KV head.
        first: First token that may go.
        end: Behind the last one.
        blocks: How many blocks of tokens go, if there are as many candidates.
        block_size: Tokens per KV block.
    """
    end_block = min(-(-end // block_size), held // block_size)
    end = min(end, end_block * block_size)
    blocks = max(0, min(blocks, (end - first) // block_size))
    tail = held - end_block * block_size
    return Fit(end_block, end_block - blocks, tail, (first, end))


def merged(kept: Fit, retain: float, borrows: bool) -> Fit:
    """The same when two layers merge what they keep.

    Args:
        kept: Of either layer.
        retain: Share of the kept tokens that stay apart, rounded down to blocks; one
            block at least, unless the share is 0.
        borrows: See `Fit`.
    """
    retained = max(int(retain * kept.kept_blocks), min(1, math.ceil(retain)))
    count = max(0, kept.kept_blocks - retained)
    return replace(kept, merged_blocks=count, borrows=borrows)


def absorbed(held: int, first: int, block_size: int, borrows: bool) -> Fit:
    """Lay out ``held`` tokens when all whole blocks from token ``first`` on merge."""
    end_block, tail = divmod(held, block_size)
    end = end_block * block_size
    count = end_block - first // block_size
    return Fit(end_block, end_block, tail, (first, end), count, borrows)


def smallest_budget(block_size: int, always_kept: int) -> int:
    """The least budget that holds the protected tokens for every prompt length.

    With less, a tail that is shorter than the protected tokens could leave no
    whole block for them.
    """
    return block_size + max(always_kept, 1) - 1


def prompt_budget(
    num_tokens: int, *, budget: int | None, keep_ratio: float | None, smallest: int
) -> int:
    """The budget of one prompt, in tokens per KV head and layer.

    Args:
        num_tokens: Length of the prompt.
        budget: A fixed number of tokens, or
        keep_ratio: a share of the prompt, 0 < r <= 1.
        smallest: Lower bound, see `smallest_budget`.
    """
    if keep_ratio is not None:
        return max(int(num_tokens * keep_ratio), smallest)
    return num_tokens if budget is None else budget


def tiers(num_layers: int, layers_per_tier: int | None) -> list[Tier]:
    """Split layers into runs of neighbours that hold equally many tokens.

    Args:
        num_layers: Layers that are compressed.
        layers_per_tier: A divisor of ``num_layers``; None = as many tiers of equal
            size as `MAX_TIERS` allows (each costs a block table).

    Raises:
        ValueError: ``layers_per_tier`` leaves a rest: vLLM would pad every tier.
    """
    if layers_per_tier is None:
        layers_per_tier = next(
            size
            for size in range(-(-num_layers // MAX_TIERS), num_layers + 1)
            if num_layers % size == 0
        )
    if num_layers % layers_per_tier:
        divisors = [n for n in range(1, num_layers + 1) if num_layers % n == 0]
        raise ValueError(
            f"layers_per_tier={layers_per_tier} must divide the {num_layers} layers "
            f"that are compressed; allowed values: {', '.join(map(str, divisors))}"
        )
    return [
        tuple(range(first, first + layers_per_tier))
        for first in range(0, num_layers, layers_per_tier)
    ]


def paired_tiers(num_layers: int, pairs: Sequence[tuple[int, int]]) -> list[Tier]:
    """Split layers into tiers of lone, of shallow and of deep ones.

    vLLM pads all groups to one size. Of the sizes that leave at most `MAX_TIERS` groups
    the one is taken with which lone and shallow layers, which hold all tokens, have
    the least padding; then the one with the fewest groups.

    Args:
        num_layers: Layers that are compressed.
        pairs: ``(shallow, deep)`` layers; tiers of both follow in the same order.
    """
    paired = [layer for pair in pairs for layer in pair]
    lone = [layer for layer in range(num_layers) if layer not in paired]
    kinds = [lone, [a for a, _ in pairs], [b for _, b in pairs]]

    def parts(size: int) -> list[int]:
        return [-(-len(layers) // size) for layers in kinds]

    sizes = range(1, num_layers + 1)
    fitting = [size for size in sizes if sum(parts(size)) <= MAX_TIERS]
    best = min(fitting, key=lambda n: (sum(parts(n)[:2]) * n, sum(parts(n))))
    return [
        tuple(part)
        for layers, count in zip(kinds, parts(best), strict=True)
        for part in _split(layers, count)
    ]


def _split(layers: list[int], count: int) -> Iterable[list[int]]:
    """``count`` runs of layers whose lengths differ by one at most."""
    bounds = [len(layers) * part // max(count, 1) for part in range(count + 1)]
    return (layers[a:b] for a, b in itertools.pairwise(bounds))


def whole_block_budgets(
    layer_lengths: Sequence[int],
    tiers: Sequence[Tier],
    num_tokens: int,
    least: int,
    block_size: int,
) -> dict[Tier, int]:
    """Round lengths that never rise with depth to blocks, and neither do these.

    All layers together hold what was meant, to the nearest block (largest remainders
    are rounded up), unless ``least`` asks for more.

    Args:
        layer_lengths: In tokens per KV head, the lowest layer first.
        tiers: Which layers share a budget; all of one size.
        num_tokens: Length of the prompt, whose tail stays in any case.
        least: Tokens that every layer holds.
        block_size: Tokens per KV block.
    """
    end_block, tail = divmod(num_tokens, block_size)
    unit = block_size * len(tiers[0])
    meant = [sum(layer_lengths[layer] - tail for layer in tier) for tier in tiers]
    blocks = [tokens // unit for tokens in meant]
    missing = (sum(meant) + unit // 2) // unit - sum(blocks)
    remainders = sorted(range(len(tiers)), key=lambda i: -(meant[i] % unit))
    for number in remainders[:missing]:
        blocks[number] += 1
    fewest = min(end_block, -(-(least - tail) // block_size))
    return {
        tier: max(count, fewest) * block_size + tail
        for tier, count in zip(tiers, blocks, strict=True)
    }


def tier_budgets(
    layer_budgets: Sequence[int], tiers: Sequence[Tier], least: int
) -> dict[Tier, int]:
    """Share out layers' budgets by tier: each its mean, but at least ``least``.

    What that adds to the smallest tiers the others give up in proportion, so that
    all layers together hold no more than was meant, if ``least`` allows it.

    Args:
        layer_budgets: In tokens per KV head, the lowest layer first.
        tiers: Which layers share a budget; every layer is in one.
        least: See `smallest_budget`.
    """
    means = [sum(layer_budgets[layer] for layer in tier) / len(tier) for tier in tiers]
    above = [max(0.0, mean - least) for mean in means]
    sizes = [len(tier) for tier in tiers]
    meant = sum(mean * size for mean, size in zip(means, sizes, strict=True))
    held = sum(extra * size for extra, size in zip(above, sizes, strict=True))
    room = max(0.0, meant - least * sum(sizes))
    share = min(1.0, room / held) if held else 0.0
    return {
        tier: least + int(extra * share)
        for tier, extra in zip(tiers, above, strict=True)
    }
