"""Triton's moves of kept tokens against the meaning, bit for bit."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm_kvcompress.triton_kernels.compact import compact

from tests.kernels.pages import DEVICE, WITH_STRIDES, Paged, paged, shuffled
from vllm_kvcompress.ops.compact import compact as operation

pytestmark = pytest.mark.usefixtures("small_tiles")
TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.uint8]


def _kept(heads: int, count: int, among: int, seed: int) -> torch.Tensor:
    rows = [shuffled(count, among, seed + head) for head in range(heads)]
    return torch.stack(rows).sort(dim=1).values


def _noise(built: Paged, seed: int) -> None:
    """Every pattern of bits, those of NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    bits = built.bits
    noise = torch.randint(-(2**31), 2**31, bits.shape, generator=generator)
    bits.copy_(noise.to(bits.dtype))


def _check(built: Paged, source: list[int], kept: torch.Tensor, target: list[int]):
    """Of both, from equal caches, and of what lies between their elements."""
    sources, targets = (
        torch.tensor(blocks, dtype=torch.long, device=DEVICE)
        for blocks in (source, target)
    )
    arguments = (built.halves, sources, kept)
    before = built.bits.clone()
    operation.meaning(built.bits, *arguments, targets)
    expected = built.bits.clone()
    built.bits.copy_(before)
    compact(built.cache, *arguments, targets)
    assert built.bits.equal(expected)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_moves(data: st.DataObject) -> None:
    heads = data.draw(st.integers(1, 3))
    block_size = data.draw(st.sampled_from([1, 3, 16, 48]))
    head_size = data.draw(st.sampled_from([8, 24, 80, 300]))
    order = data.draw(st.sampled_from(WITH_STRIDES))
    dtype = data.draw(st.sampled_from(TYPES))
    built = paged(order, dtype, 9, heads, block_size, head_size)
    seed = data.draw(st.integers(0, 99))
    _noise(built, seed)
    source = shuffled(data.draw(st.integers(1, 5)), 9, seed).tolist()
    blocks = data.draw(st.integers(0, len(source)))
    overlap = data.draw(st.sampled_from(["none", "first", "any"]))
    free = [block for block in range(9) if block not in source]
    target = {"none": free[:blocks], "first": source[:blocks]}.get(
        overlap, shuffled(blocks, 9, seed + 1).tolist()
    )
    blocks = len(target)
    tokens = len(source) * block_size
    kept = _kept(heads, blocks * block_size, tokens, seed)
    _check(built, source, kept, target)


def test_target_is_the_source_in_reverse() -> None:
    built = paged("rows", torch.bfloat16, 4, 2, 16, 8)
    _noise(built, 0)
    kept = torch.arange(48, device=DEVICE).expand(2, 48)
    _check(built, [3, 0, 1], kept, [1, 0, 3])


def test_tiled_pages_are_refused() -> None:
    built = paged("tiled", torch.float32, 3, 1, 16, 8)
    blocks = torch.tensor([0], device=DEVICE)
    kept = torch.arange(16, device=DEVICE)[None]
    with pytest.raises(ValueError, match="tiled"):
        compact(built.cache, built.halves, blocks, kept, blocks + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("order", WITH_STRIDES)
@pytest.mark.parametrize("dtype", TYPES)
def test_long_prompts(order: str, dtype: torch.dtype) -> None:
    built = paged(order, dtype, 5000, 8, 16, 128)
    _noise(built, 0)
    source = shuffled(4096, 5000, 0).tolist()
    kept = _kept(8, 16_384, 65_536, 1)
    _check(built, source, kept, source[:1024])
