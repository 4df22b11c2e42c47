"""Blocks of vLLM's pool, against `budget`, `footprint` and vLLM's own grouping."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.matrix import METHODS
from vllm_kvcompress.budget import fit, paired_tiers
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.footprint import Footprint
from vllm_kvcompress.tools.plan.layers import KVLayer
from vllm_kvcompress.tools.plan.model import ModelKV
from vllm_kvcompress.tools.plan.pool import (
    FORMATS,
    STEPS_AHEAD,
    Pool,
    factor_bytes,
    group_counts,
    token_bytes,
)

WINDOW = 100


def model(full: int, sliding: int = 0, kv_heads: int = 2, size: int = 64) -> ModelKV:
    layers = [KVLayer(i, kv_heads, 2 * size) for i in range(full)]
    layers += [KVLayer(full + i, kv_heads, 2 * size, WINDOW) for i in range(sliding)]
    return ModelKV("x", "LlamaForCausalLM", len(layers), tuple(layers))


def pool(of: ModelKV, block_size: int = 16, dtype: str = "auto", **given) -> Pool:
    config = KVCompressionConfig.from_dict(given) if given else None
    return Pool(of, dtype, block_size, 512, config)


@given(
    tokens=st.integers(1, 20_000),
    budget=st.integers(100, 4000),
    block_size=st.sampled_from([16, 32, 128]),
    layers=st.integers(1, 40),
    kv_heads=st.integers(1, 8),
)
def test_one_budget(tokens, budget, block_size, layers, kv_heads) -> None:
    budget += block_size
    made = pool(
        model(layers, kv_heads=kv_heads), block_size, method="knorm", budget=budget
    )
    found = fit(tokens, budget, block_size)
    held, full = found.kept_blocks + bool(found.tail_tokens), -(-tokens // block_size)
    assert made.held(tokens) == held
    assert made.needed(tokens) == full
    assert made.peak(tokens) == full + found.kept_blocks * found.shrinks
    assert made.block_bytes == layers * block_size * kv_heads * 2 * 64 * 2


@given(
    tokens=st.integers(1, 50_000),
    layers=st.integers(2, 40),
    start=st.integers(0, 38),
    retain=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    dtype=st.sampled_from(list(FORMATS)),
)
def test_merging_pairs_are_the_footprint(tokens, layers, start, retain, dtype) -> None:
    start = min(start, layers - 2)
    given = {"method": "minicache", "start_layer": start, "retain": retain}
    made = pool(model(layers), dtype=dtype, **given)
    pairs = made.config.pairs(layers)
    sizes = [len(tier) for tier in paired_tiers(layers, pairs)]
    each = token_bytes(dtype, 128), factor_bytes(dtype)
    expected = Footprint(layers, pairs, 16, 2, *each)
    if max(sizes) < 1.5 * min(sizes):  # else vLLM splits the larger tiers
        assert made.block_bytes == expected.block_bytes
        assert made.held(tokens) == expected.blocks(tokens, retain)
    else:
        assert made.block_bytes < expected.block_bytes


@pytest.mark.parametrize(
    ("start", "retain", "ratios"),
    [
        (16, 0.05, {"auto": 1.30, "fp8": 2.54, "int8": 2.47, "int4": 4.66}),
        (8, 0.05, {"auto": 1.54, "fp8": 3.01, "int8": 2.92, "int4": 5.52}),
        (0, 0.05, {"auto": 1.89, "fp8": 3.69, "int8": 3.59, "int4": 6.77}),
    ],
)
def test_table_of_the_readme(start, retain, ratios) -> None:
    of = model(32, kv_heads=8, size=128)
    stock = pool(of)
    for name, ratio in ratios.items():
        dtype = f"{name}_per_token_head" if name.startswith("int") else name
        given = {"method": "minicache", "start_layer": start, "retain": retain}
        made = pool(of, dtype=dtype, **given)
        held = made.held(32768) * made.block_bytes
        full = stock.held(32768) * stock.block_bytes
        assert full / held == pytest.approx(ratio, abs=0.006)


@settings(max_examples=50)
@given(
    given=st.sampled_from(METHODS),
    tokens=st.integers(1, 20_000),
    sliding=st.sampled_from([0, 8, 24]),
)
def test_every_method(given, tokens, sliding) -> None:
    """Sum over tiers of what `tier_fits` says, and of the windows."""
    made = pool(model(8, sliding), **given)
    stock = pool(model(8, sliding))
    tiers = made.config.tiers(8)
    fits = made.config.tier_fits(made.config.method, tiers, tokens, 16)
    held = sum(f.own_blocks + bool(f.tail_tokens) for f in fits.values())
    blocks = -(-tokens // 16)
    window = blocks - max(0, tokens - WINDOW + 1) // 16
    size = len(tiers[0])
    groups = sliding // size
    if not sliding or (size <= sliding and sliding % size == 0):
        assert made.held(tokens) == held + groups * window
    held_bytes = made.held(tokens) * made.block_bytes
    assert held_bytes <= made.peak(tokens) * made.block_bytes
    full = stock.needed(tokens) * stock.block_bytes
    if not sliding:
        assert held_bytes <= full * (1 + 4 / 256)  # factors of merged tokens


@given(lengths=st.lists(st.integers(1, 100_000), min_size=2), sliding=st.booleans())
def test_longer_prompts_take_no_less(lengths, sliding) -> None:
    of = model(8, 8 * sliding)
    incremental = {"prefill": "incremental", "decode": {"interval": 128}}
    for made in (
        pool(of),
        pool(of, method="knorm", budget=1024),
        pool(of, method="knorm", budget=1024, **incremental),
    ):
        needed = [made.needed(tokens) for tokens in sorted(lengths)]
        assert needed == sorted(needed)
        full = [made.held(16 * tokens) for tokens in sorted(lengths)]
        assert full == sorted(full)


@given(
    tokens=st.integers(1, 50_000),
    blocks=st.integers(2, 20_000),
    budget=st.sampled_from([256, 1024]),
)
def test_requests_and_longest(tokens, blocks, budget) -> None:
    made = pool(model(4), method="knorm", budget=budget)
    space = blocks * made.block_bytes
    count = made.requests(tokens, space)
    free = blocks - 1  # one is vLLM's null block
    if count:
        assert (count - 1) * made.held(tokens) + made.needed(tokens) <= free
    assert count * made.held(tokens) + made.needed(tokens) > free
    longest = made.longest(space, 10**6)
    assert made.needed(longest) <= free < made.needed(longest + 1)
    assert made.longest(space, 7) == 7


def test_incremental_prefill_bounds_the_peak() -> None:
    bounded = {"prefill": "incremental", "decode": {"interval": 128}}
    made = pool(model(4), method="knorm", budget=1024, **bounded)
    assert made.peak(10**6) == made.needed(10**6) == (2 * 1024 + 2048) // 16
    assert made.peak(100) == 7


def test_pages_of_two_sizes() -> None:
    """Layers with half the page get blocks of twice the tokens, as in Gemma 4."""
    wide = model(2, 4)
    layers = [replace(x, elements=256) if x.window is None else x for x in wide.layers]
    made = pool(replace(wide, layers=tuple(layers)))
    assert [bucket.block_size for bucket in made.buckets] == [16, 32]
    assert made.block_bytes == 2 * 16 * 2 * 256 * 2
    assert made.held(64) == 4 + 2 * 2


@pytest.mark.vllm
@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=2, max_size=5))
def test_vllm_groups_so(sizes) -> None:
    import torch
    from vllm.v1.core.kv_cache_utils import _get_kv_cache_groups_uniform_page_size
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    specs = {
        f"{number}.{layer}": SlidingWindowSpec(
            block_size=16,
            num_kv_heads=2,
            head_size=64,
            dtype=torch.float16,
            sliding_window=number + 1,
        )
        for number, size in enumerate(sizes)
        for layer in range(size)
    }
    groups = _get_kv_cache_groups_uniform_page_size(specs)
    first = [group.layer_names[0].partition(".")[0] for group in groups]
    assert [first.count(str(n)) for n in range(len(sizes))] == group_counts(sizes)


@pytest.mark.vllm
@settings(deadline=None)
@given(
    tokens=st.integers(1, 5000),
    batched=st.integers(1, 2000),
    window=st.integers(1, 2000),
    chunked=st.booleans(),
)
def test_vllm_admits_windows_so(tokens, batched, window, chunked) -> None:
    import torch
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, SlidingWindowSpec

    cls = ChunkedLocalAttentionSpec if chunked else SlidingWindowSpec
    name = "attention_chunk_size" if chunked else "sliding_window"
    shape = {"num_kv_heads": 2, "head_size": 64, "dtype": torch.float16}
    spec = cls(block_size=16, **shape, **{name: window})
    of = ModelKV("x", "X", 1, (KVLayer(0, 2, 128, window, chunked),))
    made = Pool(of, "auto", 16, batched)
    cap = spec.max_admission_blocks_per_request(STEPS_AHEAD * batched, tokens)
    assert made.needed(tokens) == min(-(-tokens // 16), cap)
    assert made.block_bytes == spec.page_size_bytes


@pytest.mark.vllm
def test_names_are_the_engines() -> None:
    from vllm_kvcompress.engine.page_formats import QUANTISED, UNQUANTISED

    assert {*UNQUANTISED, *QUANTISED} <= set(FORMATS)
