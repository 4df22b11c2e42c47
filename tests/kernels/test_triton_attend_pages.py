"""Triton's attention over pages with factors against the meaning."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm_kvcompress.triton_kernels.attend_pages import attend_pages

from tests.kernels.pages import DEVICE, WITH_STRIDES, paged, random, shuffled
from vllm_kvcompress.ops.attend_pages import attend_pages as operation

pytestmark = pytest.mark.usefixtures("small_tiles")
# Of the cache, of queries and of factors.
TYPES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.float16, torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16, torch.float16),
    (torch.float8_e4m3fn, torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.float32, torch.float32),
]


def _check(
    order: str,
    types: tuple[torch.dtype, torch.dtype, torch.dtype],
    lens: list[int],
    heads: int,
    group: int,
    block_size: int,
    head_size: int,
    softcap: float,
) -> None:
    counts = [-(-length // block_size) for length in lens]
    num_blocks = sum(counts) + 2
    built = paged(order, types[0], num_blocks, heads, block_size, head_size)
    blocks = shuffled(sum(counts), num_blocks, seed=sum(lens))
    for row, own in enumerate(blocks.split(counts)):
        shape = heads, lens[row], head_size
        keys, values = (random(*shape, seed=row + i, dtype=types[0]) for i in (0, 9))
        built.write(own, keys, values)
    scales = 1 + random(2, num_blocks, block_size, heads, seed=7).abs()
    query = random(len(lens), heads * group, head_size, seed=5, dtype=types[1])
    arguments = (
        *(query, built.cache, built.halves, blocks),
        torch.tensor([0, *counts], device=DEVICE).cumsum(0),
        torch.tensor(lens, device=DEVICE),
        scales.to(types[2]),
    )
    found = attend_pages(*arguments, scale=0.2, softcap=softcap)
    expected = operation.meaning(*arguments, scale=0.2, softcap=softcap)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    order=st.sampled_from(WITH_STRIDES),
    types=st.sampled_from(TYPES),
    lens=st.lists(st.integers(0, 70), min_size=1, max_size=3),
    heads=st.integers(1, 2),
    group=st.sampled_from([1, 3, 4, 17]),
    block_size=st.sampled_from([1, 16, 48]),
    head_size=st.sampled_from([8, 80, 96]),
    softcap=st.sampled_from([0.0, 5.0]),
)
def test_rows_of_any_length(
    order: str,
    types: tuple[torch.dtype, torch.dtype, torch.dtype],
    lens: list[int],
    heads: int,
    group: int,
    block_size: int,
    head_size: int,
    softcap: float,
) -> None:
    _check(order, types, lens, heads, group, block_size, head_size, softcap)


def test_rows_without_tokens_are_zero() -> None:
    built = paged("rows", torch.float32, 2, 1, 16, 8)
    nothing = torch.zeros(2, dtype=torch.long, device=DEVICE)
    found = attend_pages(
        *(random(1, 2, 8, seed=0), built.cache, built.halves, nothing[:0], nothing),
        *(nothing[:1], torch.ones(2, 2, 16, 1, device=DEVICE)),
        scale=1.0,
    )
    assert found.equal(torch.zeros_like(found))


@pytest.mark.gpu
@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("head_size", [80, 128, 256])
@pytest.mark.parametrize("lens", [[30_001], [1, 700, 4096, 15] * 8], ids=len)
def test_long_rows(
    types: tuple[torch.dtype, torch.dtype, torch.dtype],
    head_size: int,
    lens: list[int],
) -> None:
    _check("rows", types, lens, 8, 4, 16, head_size, 0.0)
