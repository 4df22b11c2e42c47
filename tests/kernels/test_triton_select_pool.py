"""Triton's selection and pooling against their meanings, bit for bit in selection."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm_kvcompress.triton_kernels.pool import pool
from vllm_kvcompress.triton_kernels.select import select

from tests.kernels.pages import DEVICE, random
from vllm_kvcompress.ops.pool import pool as pool_operation
from vllm_kvcompress.ops.select import select as select_operation

pytestmark = pytest.mark.usefixtures("small_tiles")
few = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
ODD = [0.0, -0.0, 0.5, 1.0, 1 + 2.0**-23, 1e-40, -1e-40, -1.0]
ODD += [math.inf, -math.inf, math.nan, -math.nan]


@few
@given(st.data())
def test_select(data: st.DataObject) -> None:
    numbers = st.one_of(st.sampled_from(ODD), st.floats(width=32))
    row = data.draw(st.lists(numbers, min_size=1, max_size=40))
    count = data.draw(st.integers(0, len(row)))
    scores = torch.tensor([row, row[::-1]], device=DEVICE)
    expected = select_operation.meaning(scores, count)
    assert select(scores, count).equal(expected)
    assert select(scores.T.contiguous().T, count).equal(expected)


def test_select_among_equal_scores() -> None:
    """Over several tiles, where the last ones kept share their score."""
    scores = random(3, 60, seed=0).mul(2).round()
    for count in (1, 17, 40, 60):
        expected = select_operation.meaning(scores, count)
        assert select(scores, count).equal(expected)


def test_nan_of_both_signs_is_highest() -> None:
    bits = torch.tensor([0x7F800000, 0x7FC00000, -0x400000, 0x7F800001])
    scores = bits.int().view(torch.float32)[None].to(DEVICE)
    assert select(scores, 3).tolist() == [[1, 2, 3]]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4096, 131_072, 1_000_003])
@pytest.mark.parametrize("ties", [False, True])
def test_select_long_rows(tokens: int, ties: bool) -> None:
    scores = random(8, tokens, seed=0)
    scores = scores.round() if ties else scores.softmax(-1)
    for count in (1, 1024, tokens // 2):
        expected = select_operation.meaning(scores, count)
        assert select(scores, count).equal(expected)


@few
@given(
    pooling=st.sampled_from(["max", "avg"]),
    kernel_size=st.sampled_from([1, 3, 7, 31]),
    tokens=st.integers(0, 40),
    turned=st.booleans(),
    seed=st.integers(0, 99),
)
def test_pool(
    pooling: str, kernel_size: int, tokens: int, turned: bool, seed: int
) -> None:
    scores = random(tokens, 2, seed=seed).T
    scores = scores if turned else scores.contiguous()
    options = {"kernel_size": kernel_size, "pooling": pooling}
    expected = pool_operation.meaning(scores, **options)
    torch.testing.assert_close(pool(scores, **options), expected)


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_pool_what_is_not_finite(pooling: str) -> None:
    row = [0.0] * 5 + [math.inf] + [1.0] * 6 + [-math.inf] * 9 + [2.0] * 5 + [math.nan]
    scores = torch.tensor([row + [3.0] * 6], device=DEVICE)
    expected = pool_operation.meaning(scores, kernel_size=5, pooling=pooling)
    found = pool(scores, kernel_size=5, pooling=pooling)
    torch.testing.assert_close(found, expected, equal_nan=True)
