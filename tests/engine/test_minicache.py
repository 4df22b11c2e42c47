"""MiniCache against a dense model whose keys and values are merged in loops."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dense import DenseLlama
from tests.engine.conftest import (
    BLOCK,
    attention,
    block_bytes,
    blocks_held,
    calibrate,
    engine,
    free_blocks,
    generate,
    prompt,
    save_llama,
)
from tests.merged import Merges
from tests.quantised import Stored, fp8, fp8_cut
from vllm_kvcompress import stats
from vllm_kvcompress.config import ConfigError
from vllm_kvcompress.footprint import Footprint

LAYERS, COUNT = 4, 80
LENGTHS = [500, 90, 231, 97]
COURSES: dict[str, dict[str, Any]] = {
    "default": {"interval": 48},
    "range": {"retention": "range", "retain": 0.25, "gamma": 0.4, "interval": 16},
    "all layers": {"start_layer": 0, "retain": 0.0, "t": 0.3, "interval": None},
    "selected": {
        "over": {"method": "snapkv", "window": 16},
        "budget": 192,
        "retain": 0.2,
        "interval": 32,
    },
}


@pytest.fixture(scope="module", params=COURSES)
def served(request: Any, deep_llama: Path) -> Iterator[tuple[Any, Any]]:
    settings = {"method": "minicache", **COURSES[request.param]}
    config = {"kv_compression": settings}
    with engine(deep_llama, additional_config=config) as llm:
        yield llm, settings


def _check(
    llm: Any,
    dense: DenseLlama,
    settings: dict[str, Any],
    tolerance: float = 5e-4,
    **kwargs: Any,
) -> None:
    """Serve all lengths, and compare with what a dense model of merged tokens says."""
    before = free_blocks(llm)
    answers = generate(llm, [prompt(n, seed=n) for n in LENGTHS], COUNT)
    assert free_blocks(llm) == before
    assert stats(llm)["tokens_merged"] > 0
    for length, answer in zip(LENGTHS, answers, strict=True):
        tokens = prompt(length, seed=length) + answer.tokens
        found = Merges(settings, dense.layers, length, COUNT, BLOCK, **kwargs)
        expected = dense.run(tokens, length, found.cuts, found.edits)
        error = float((expected - answer.logprobs).abs().max())
        assert error < tolerance, length


def test_logits_are_the_dense_models(served: Any, deep_llama: Path) -> None:
    llm, settings = served
    _check(llm, DenseLlama(deep_llama), settings)


def test_pages_are_restored_without_a_kernel(deep_llama: Path) -> None:
    settings = {"method": "minicache", "kernels": "torch", **COURSES["default"]}
    with engine(deep_llama, additional_config={"kv_compression": settings}) as llm:
        _check(llm, DenseLlama(deep_llama), settings)


def test_pairs_with_one_memory_share_factors(tmp_path: Path) -> None:
    """Two groups of deep layers, on the same pages with the same factors."""
    model = save_llama(tmp_path, layers=5)
    settings = {"method": "minicache", "start_layer": 1, "interval": 48}
    with engine(model, additional_config={"kv_compression": settings}) as llm:
        deep = [layer for layer in attention(llm) if hasattr(layer, "page_scales")]
        assert len({layer.page_scales.data_ptr() for layer in deep}) == 1
        assert len(deep) == 2
        _check(llm, DenseLlama(model), settings)


def test_pairs_share_8_bit_floats(deep_llama: Path) -> None:
    """Every layer has scales of its own, as a calibrated model's have.

    None are retained: of two tokens near the border a code could choose.
    """
    settings = {"method": "minicache", "interval": 48, "retain": 0.0}
    config = {"kv_compression": settings}
    with engine(deep_llama, additional_config=config, kv_cache_dtype="fp8") as llm:
        scales = calibrate(llm)
        dense = DenseLlama(deep_llama)
        dense.stored = lambda x, layer, half: fp8_cut(x, scales[layer][half])
        nearest: Stored = lambda x, layer, half: fp8(x, scales[layer][half])  # noqa: E731
        # One code more or less is up to an eighth of an element; wrong scales are 1.
        _check(llm, dense, settings, 0.1, stored=nearest)


def test_bytes_are_the_formulas(deep_llama: Path) -> None:
    config = {"kv_compression": {"method": "minicache", "retain": 0.25}}
    kinds = {"dtype": "bfloat16", "additional_config": config}
    with engine(deep_llama, **kinds) as llm:
        held = blocks_held(llm, prompt(300)) * block_bytes(llm)
    model = Footprint(LAYERS, [(2, 3)], BLOCK, 2, 2 * 32 * 2, 4)
    assert held == model.request_bytes(300, retain=0.25)


def test_scales_per_token_need_tritons_kernels(deep_llama: Path) -> None:
    config = {"kv_compression": {"method": "minicache"}}
    with (
        pytest.raises(ConfigError, match="CPU_ATTN.*give --attention-backend TRITON"),
        engine(
            deep_llama,
            additional_config=config,
            kv_cache_dtype="int4_per_token_head",
        ),
    ):
        pass
