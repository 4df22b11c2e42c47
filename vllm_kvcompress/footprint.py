"""KV bytes of a request whose layers merge in pairs: lengths only, no tensors.

vLLM's pool hands out blocks of one size: each holds ``block_size`` tokens of as many
layers as the largest tier has, with their factors. A tier that holds b blocks of a
request therefore takes b times that, and

    bytes = blocks * layers per block * block_size * kv_heads * (token + factors)

where blocks are those that all tiers hold: all n of a prompt's in tiers of lone and
of shallow layers, the retained ones and the tail once more in tiers of deep layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .budget import fit, merged, paired_tiers


@dataclass(frozen=True)
class Footprint:
    """What a model of merging pairs takes.

    Attributes:
        num_layers: Layers with full attention.
        pairs: ``(shallow, deep)`` of them.
        block_size: Tokens per block.
        kv_heads: Per layer.
        token_bytes: A token's key and value of one KV head and layer in a page, with
            what scales there are in the page.
        factor_bytes: The factors of the same key and value beside the page: 4 in
            16-bit floats, 8 of codes, 0 if nothing merges.
    """

    num_layers: int
    pairs: Sequence[tuple[int, int]]
    block_size: int
    kv_heads: int
    token_bytes: int
    factor_bytes: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of the pool, in all layers that it serves."""
        tiers = paired_tiers(self.num_layers, self.pairs)
        deep = {layer for _, layer in self.pairs}
        scaled = max((len(tier) for tier in tiers if deep.issuperset(tier)), default=0)
        pages = max(map(len, tiers)) * self.token_bytes
        tokens = self.block_size * self.kv_heads
        return tokens * (pages + scaled * self.factor_bytes)

    def blocks(self, num_tokens: int, retain: float) -> int:
        """Blocks that a prompt holds after merging.

        Args:
            num_tokens: Of the prompt.
            retain: Share of tokens that stay apart.
        """
        tiers = paired_tiers(self.num_layers, self.pairs)
        deep = {layer for _, layer in self.pairs}
        own = sum(deep.issuperset(tier) for tier in tiers)
        kept = fit(num_tokens, num_tokens, self.block_size)
        left = merged(kept, retain, borrows=True)
        held = -(-num_tokens // self.block_size)
        return held * len(tiers) - own * left.merged_blocks

    def request_bytes(self, num_tokens: int, retain: float) -> int:
        """Bytes that a prompt holds after merging, see `blocks`."""
        return self.blocks(num_tokens, retain) * self.block_bytes
