"""How much memory a compressed prompt holds: lengths only, no tensors.

A prompt of n tokens fills ``n // block_size`` whole blocks and a tail. The tail
stays where it is; of the whole blocks' tokens as many are kept, in as few private
blocks, as the budget leaves room for. So the kept tokens number at most the
budget, and are congruent to n modulo the block size: slots stay logical.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fit:
    """What becomes of one prompt in one KV cache group.

    Attributes:
        end_block: Logical blocks ``[0, end_block)`` are replaced.
        kept_blocks: Private blocks that replace them.
        tail_tokens: Tokens behind them, kept as they are.
    """

    end_block: int
    kept_blocks: int
    tail_tokens: int

    @property
    def freed_blocks(self) -> int:
        """Blocks that go back to the pool."""
        return self.end_block - self.kept_blocks

    @property
    def shrinks(self) -> bool:
        """Whether compressing frees at least one block."""
        return self.freed_blocks > 0


def fit(num_tokens: int, budget: int, block_size: int) -> Fit:
    """Lay a prompt of ``num_tokens`` into at most ``budget`` tokens per KV head."""
    end_block, tail = divmod(num_tokens, block_size)
    return Fit(end_block, min(end_block, max(0, budget - tail) // block_size), tail)


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
