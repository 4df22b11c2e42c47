"""Triton's votes of the window against the meaning, over pages of every order."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm_kvcompress.triton_kernels.window_scores import window_scores

from tests.kernels.pages import DEVICE, WITH_STRIDES, paged, random, shuffled
from vllm_kvcompress.ops.pages import PagedKeys
from vllm_kvcompress.ops.window_scores import window_scores as operation

pytestmark = pytest.mark.usefixtures("small_tiles")
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
# Of a page and of queries, which are never 8-bit floats.
TYPES = [*((x, x) for x in FLOATS), (torch.float8_e4m3fn, torch.bfloat16)]
TYPES += [(torch.bfloat16, torch.float32), (torch.float8_e4m3fn, torch.float16)]


def _options(data: st.DataObject, window: int, group: int) -> dict[str, object]:
    weights = data.draw(st.booleans())
    flags = st.lists(st.booleans(), min_size=group, max_size=group)
    return {
        "scale": 0.3,
        "softcap": data.draw(st.sampled_from([0.0, 4.0])),
        "weights": random(window, seed=9).abs() if weights else None,
        "past_only": data.draw(st.one_of(st.just([]), flags)),
    }


def _held(
    order: str,
    types: tuple[torch.dtype, torch.dtype],
    heads: int,
    tokens: int,
    block_size: int,
    head_size: int,
    own_pages: bool,
) -> PagedKeys:
    """Random keys in blocks of no order; pages of one head each, or of all."""
    count = -(-tokens // block_size)
    rows = heads if own_pages else 1
    built = paged(
        order,
        types[0],
        rows * count + 2,
        1 if own_pages else heads,
        block_size,
        head_size,
    )
    blocks = shuffled(rows * count, rows * count + 2, seed=tokens).view(rows, count)
    for row in range(rows):
        keys, values = (
            random(built.cache.shape[1], tokens, head_size, seed=seed, dtype=types[0])
            for seed in (row, row + 1)
        )
        built.write(blocks[row], keys, values)
    return PagedKeys(built.cache, built.halves[0], blocks.expand(heads, count), tokens)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_pages(data: st.DataObject) -> None:
    group, window = data.draw(st.sampled_from([1, 3, 4])), data.draw(st.integers(1, 7))
    tokens = window + data.draw(st.integers(0, 55))
    heads = data.draw(st.integers(1, 2))
    types = data.draw(st.sampled_from(TYPES))
    keys = _held(
        data.draw(st.sampled_from(WITH_STRIDES)),
        types,
        heads,
        tokens,
        data.draw(st.sampled_from([1, 16, 32, 48])),
        data.draw(st.sampled_from([8, 16, 80, 96])),
        data.draw(st.booleans()),
    )
    queries = random(window, heads * group, keys.shape[2], seed=5, dtype=types[1])
    options = _options(data, window, group)
    found = window_scores(queries, keys, **options)
    torch.testing.assert_close(found, operation.meaning(queries, keys, **options))


@pytest.mark.parametrize("dtype", FLOATS)
def test_dense_keys_of_any_strides(dtype: torch.dtype) -> None:
    keys = random(40, 2, 96, seed=0, dtype=dtype)[:, :, ::2].transpose(0, 1)
    queries = random(4, 5, 48, seed=1, dtype=dtype)[:, 1:]
    found = window_scores(queries, keys, scale=0.2)
    torch.testing.assert_close(found, operation.meaning(queries, keys, scale=0.2))


def test_large_logits() -> None:
    """Far from where exponentials are finite, with ties between splits."""
    keys = random(1, 50, 16, seed=0).repeat(2, 1, 1) * 300
    keys[1] = keys[1, :1]
    queries = random(3, 4, 16, seed=1) * 30
    found = window_scores(queries, keys, scale=1.0)
    expected = operation.meaning(queries, keys, scale=1.0)
    torch.testing.assert_close(found, expected)


def test_tiled_pages_are_refused() -> None:
    built = paged("tiled", torch.float32, 3, 2, 16, 8)
    blocks = torch.tensor([[0, 1]], device=DEVICE).expand(2, 2)
    keys = PagedKeys(built.cache, built.halves[0], blocks, 20)
    with pytest.raises(ValueError, match="tiled"):
        window_scores(random(2, 2, 8, seed=0), keys, scale=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("head_size", [96, 128, 256])
@pytest.mark.parametrize("tokens", [4096, 131_071])
def test_long_prompts(
    types: tuple[torch.dtype, torch.dtype], head_size: int, tokens: int
) -> None:
    keys = _held("rows", types, 2, tokens, 16, head_size, False)
    queries = random(32, 8, head_size, seed=5, dtype=types[1])
    found = window_scores(queries, keys, scale=head_size**-0.5)
    expected = operation.meaning(queries, keys, scale=head_size**-0.5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
