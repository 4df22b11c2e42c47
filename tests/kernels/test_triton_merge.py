"""Triton's merged vectors against the meaning."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm_kvcompress.triton_kernels.merge import merge

from tests.kernels.pages import DEVICE, random
from vllm_kvcompress.ops.merge import merge as operation

pytestmark = pytest.mark.usefixtures("small_tiles")
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def _check(shallow: torch.Tensor, deep: torch.Tensor, t: float) -> None:
    found, expected = merge(shallow, deep, t), operation.meaning(shallow, deep, t)
    for name in ("shared", "ratio"):
        mine, meant = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(mine, meant, rtol=2e-5, atol=2e-6, msg=name)
    # The angle between parallel vectors hangs on their cosine's last bit.
    cosines = [torch.cos(math.pi * x.distance) for x in (found, expected)]
    torch.testing.assert_close(*cosines, rtol=0, atol=1e-6, msg="distance")


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=st.sampled_from([(), (0,), (1,), (37,), (2, 9), (3, 2, 5)]),
    head_size=st.sampled_from([1, 16, 80, 96]),
    dtype=st.sampled_from(FLOATS),
    t=st.sampled_from([0.0, 0.3, 0.5, 0.6, 1.0]),
    size=st.sampled_from([1e-3, 1.0, 300.0]),
    alike=st.sampled_from([0.0, 0.9, 1.0]),
    seed=st.integers(0, 99),
)
def test_vectors(
    shape: tuple[int, ...],
    head_size: int,
    dtype: torch.dtype,
    t: float,
    size: float,
    alike: float,
    seed: int,
) -> None:
    shallow = random(*shape, head_size, seed=seed)
    deep = size * torch.lerp(random(*shape, head_size, seed=seed + 1), shallow, alike)
    if head_size == 1:  # opposite, or parallel, as signs have it
        deep, shallow = deep.sign(), shallow.sign()
    _check(shallow.to(dtype), deep.to(dtype), t)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_special_vectors(t: float, dtype: torch.dtype) -> None:
    """Every pair of them."""
    ones, axis = torch.ones(16), torch.eye(16)[0]
    special = [ones, -ones, 2 * ones, axis, -axis, 0 * ones]
    for odd in (math.nan, math.inf, -math.inf):
        special.append(ones.clone().index_fill_(0, torch.tensor([3]), odd))
    if dtype != torch.float16:
        special.append(3e38 * ones)  # infinitely long, though every element is finite
    vectors = torch.stack(special).to(dtype).to(DEVICE)
    count = len(vectors)
    shallow = vectors[:, None].expand(count, count, 16)
    _check(shallow, shallow.transpose(0, 1), t)


def test_vectors_of_any_strides() -> None:
    both = random(2, 24, 5, 3, seed=0).permute(0, 3, 2, 1)
    _check(both[0], both[1], 0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head_size", [80, 128, 256])
def test_many_vectors(dtype: torch.dtype, head_size: int) -> None:
    shallow, deep = (
        random(8, 20_000, head_size, seed=seed, dtype=dtype) for seed in (0, 1)
    )
    _check(shallow, deep, 0.5)
