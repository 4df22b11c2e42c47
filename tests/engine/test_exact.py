"""The kept tokens are SnapKV's, and decoding reads exactly them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.dense import DenseLlama
from tests.engine.conftest import (
    BLOCK,
    Recording,
    engine,
    free_blocks,
    generate,
    prompt,
    save_llama,
)
from tests.oracle import snapkv_kept, snapkv_scores

WINDOW, BUDGET = 16, 96
SETTINGS = {"method": "snapkv", "budget": BUDGET, "window": WINDOW, "kernel_size": 5}
LENGTHS = sorted(
    {
        *(WINDOW, WINDOW + 1, BUDGET - 1, BUDGET, BUDGET + 1),
        *(m * BLOCK + d for m in (3, 4, 7) for d in (-1, 0, 1)),
        *(5 * BLOCK + WINDOW + d for d in (-1, 0, 1)),
    }
)


@pytest.fixture(
    scope="module",
    params=[(2, "float32", "max"), (8, "float32", "avg"), (2, "bfloat16", "max")],
    ids=["GQA4-fp32-max", "GQA1-fp32-avg", "GQA4-bf16-max"],
)
def served(request: Any, tmp_path_factory: Any) -> Iterator[tuple[Any, Any, str, str]]:
    kv_heads, dtype, pooling = request.param
    path = save_llama(tmp_path_factory.mktemp("exact"), kv_heads=kv_heads)
    settings = {**SETTINGS, "pooling": pooling}
    with engine(path, dtype=dtype, additional_config={"kv_compression": settings}) as e:
        yield e, path, dtype, pooling


def _oracle(
    queries: torch.Tensor, keys: torch.Tensor, length: int, pooling: str
) -> list[set[int]]:
    scores = snapkv_scores(
        queries,
        keys,
        window=WINDOW,
        kernel_size=SETTINGS["kernel_size"],
        pooling=pooling,
        scale=keys.shape[2] ** -0.5,
    )
    return snapkv_kept(scores, num_tokens=length, budget=BUDGET, block_size=BLOCK)


@pytest.mark.parametrize("length", LENGTHS)
def test_kept_set_and_logits(served: Any, recording: Recording, length: int) -> None:
    llm, path, dtype, pooling = served
    before = free_blocks(llm)
    tokens = prompt(length, seed=length)
    (answer,) = generate(llm, [tokens], 8)
    assert free_blocks(llm) == before
    if length // BLOCK <= (BUDGET - length % BLOCK) // BLOCK:
        assert not recording.kept
        return
    end = length // BLOCK * BLOCK
    visible = []
    assert len(recording.kept) == 2
    for kept, queries, keys in zip(
        recording.kept, recording.queries, recording.keys, strict=True
    ):
        padded = queries.new_zeros(length, *queries.shape[1:])
        padded[-WINDOW:] = queries
        expected = _oracle(padded, keys, length, pooling)
        mask = torch.zeros(keys.shape[0], length, dtype=torch.bool)
        for head, row in enumerate(kept.tolist()):
            assert row == sorted(set(row))
            assert set(row) | set(range(end, length)) == expected[head]
            mask[head, row] = True
        mask[:, end:] = True
        visible.append(mask)
    if length > 2 * BUDGET:
        assert any(not torch.equal(mask[0], mask[1]) for mask in visible)
    if dtype == "float32":
        model = DenseLlama(path)
        dense = model.decode(model.prefill(tokens), answer.tokens, visible)
        assert float((dense - answer.logprobs).abs().max()) < 5e-4


def test_oracle_from_the_dense_model(served: Any, recording: Recording) -> None:
    """Queries and keys come from the dense model too: nothing of ours judges."""
    llm, path, dtype, pooling = served
    if dtype != "float32":
        pytest.skip("the dense model is float32")
    length = 7 * BLOCK + 5
    tokens = prompt(length, seed=99)
    generate(llm, [tokens], 2)
    state = DenseLlama(path).prefill(tokens)
    for layer, kept in enumerate(recording.kept):
        expected = _oracle(state.queries[layer], state.keys[layer], length, pooling)
        for head, row in enumerate(kept.tolist()):
            assert set(row) | set(range(7 * BLOCK, length)) == expected[head]


def test_first_token_is_full_attention(served: Any) -> None:
    llm, path, dtype, _ = served
    if dtype != "float32":
        pytest.skip("the dense model is float32")
    tokens = prompt(500, seed=7)
    (answer,) = generate(llm, [tokens], 2)
    dense = DenseLlama(path).prefill(tokens).logprobs
    assert float((dense - answer.logprobs[0]).abs().max()) < 5e-4


def test_compression_matters(served: Any) -> None:
    """The tests above could not pass with compression silently off."""
    llm, path, dtype, _ = served
    if dtype != "float32":
        pytest.skip("the dense model is float32")
    tokens = prompt(500, seed=7)
    (answer,) = generate(llm, [tokens], 8)
    model = DenseLlama(path)
    full = model.decode(model.prefill(tokens), answer.tokens, None)
    assert float((full - answer.logprobs)[1:].abs().max()) > 0.1
