"""The bytes that layers which merge in pairs take, by hand."""

import pytest

from vllm_kvcompress.footprint import Footprint
from vllm_kvcompress.methods.minicache import MiniCache


@pytest.mark.parametrize(
    ("token_bytes", "factor_bytes"), [(512, 4), (264, 8), (136, 8)]
)
def test_a_half_of_the_layers_is_shared(token_bytes: int, factor_bytes: int) -> None:
    """32 layers of head size 128, in bfloat16, 8 and 4 bits: 16 alone, 8 pairs."""
    pairs = MiniCache().layer_pairs(32)
    model = Footprint(32, pairs, 16, 8, token_bytes, factor_bytes)
    page = 16 * 8 * (token_bytes + factor_bytes)
    assert model.block_bytes == 8 * page
    # 100 whole blocks and a tail: twice 101 for 16 layers, 101 for the shallow ones;
    # of the deep ones 5 blocks are retained beside the tail.
    assert model.blocks(1605, retain=0.05) == 3 * 101 + 6
    assert model.blocks(1605, retain=0.0) == 3 * 101 + 1
    assert model.blocks(1605, retain=1.0) == 4 * 101
    assert model.request_bytes(1605, retain=0.05) == (3 * 101 + 6) * 8 * page


def test_tiers_share_factors() -> None:
    """Of 32 layers 12 pairs merge, in tiers of four layers each."""
    model = Footprint(32, MiniCache(start_layer=8).layer_pairs(32), 16, 1, 136, 8)
    assert model.block_bytes == 4 * 16 * (136 + 8)
    assert model.blocks(320, retain=0.0) == 5 * 20


def test_nothing_merges() -> None:
    model = Footprint(32, (), 16, 8, 512, 0)
    assert model.request_bytes(1600, retain=0.0) == 32 * 1600 * 8 * 512


@pytest.mark.parametrize(
    ("start", "retain", "head_size", "ratio"),
    [
        (16, 0.05, 128, 4.66),
        (8, 0.05, 128, 5.52),
        (16, 0.05, 64, 4.20),
        (8, 0.05, 64, 4.97),
        (8, 0.02, 64, 5.06),
    ],
)
def test_ratio_of_4_bits(
    start: int, retain: float, head_size: int, ratio: float
) -> None:
    """To all of 32 layers in bfloat16; the paper has 5.02 without saying of what."""
    pairs = MiniCache(start_layer=start).layer_pairs(32)
    model = Footprint(32, pairs, 16, 1, token_bytes=head_size + 8, factor_bytes=8)
    full = Footprint(32, (), 16, 1, token_bytes=4 * head_size, factor_bytes=0)
    taken = model.request_bytes(32768, retain)
    assert full.request_bytes(32768, 0.0) / taken == pytest.approx(ratio, abs=0.01)
