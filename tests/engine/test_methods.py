"""Every method of the matrix, through real vLLM."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dense import DenseLlama
from tests.engine.conftest import (
    BLOCK,
    Recording,
    attention,
    calibrate,
    engine,
    free_blocks,
    generate,
    prompt,
)
from tests.engine.serving import LAYERS, fits
from tests.matrix import METHODS
from tests.quantised import fp8_cut
from vllm_kvcompress import stats
from vllm_kvcompress.config import ConfigError, KVCompressionConfig
from vllm_kvcompress.engine.kernels import warm_up
from vllm_kvcompress.methods.base import Scorer
from vllm_kvcompress.methods.streamingllm import StreamingLLM
from vllm_kvcompress.methods.tova import TOVA
from vllm_kvcompress.ops.providers import operations

LENGTHS = [1000, 37, 512, 335]
KV_HEADS = 2


# Those that merge have a module of their own.
APART = [e for e in METHODS if not KVCompressionConfig.from_dict(e).scorer.merges]


@pytest.mark.parametrize("settings", APART, ids=str)
def test_method(llama: Path, settings: dict[str, Any], recording: Recording) -> None:
    with engine(llama, additional_config={"kv_compression": settings}) as llm:
        _check(llm, DenseLlama(llama), settings, recording, 5e-4)


def test_method_runs_on_tritons_kernels(llama: Path, recording: Recording) -> None:
    """By name they run in Triton's interpreter, and keep what torch would keep."""
    settings = {"method": "snapkv", "budget": 256, "kernels": "triton"}
    with engine(llama, additional_config={"kv_compression": settings}) as llm:
        used = {own.name for own in operations().values() if own.provider == "triton"}
        assert used == set(operations())
        _check(llm, DenseLlama(llama), settings, recording, 5e-4)


def test_kernels_that_cannot_be_had_are_refused(llama: Path) -> None:
    config = {"kv_compression": {"method": "snapkv", "kernels": {"select": "xformers"}}}
    with (
        pytest.raises(ConfigError, match="xformers cannot serve select.*leave it out"),
        engine(llama, additional_config=config),
    ):
        pass


# By attention, by keys alone, by head, by tier, and by values too.
QUANTISED = ["snapkv", "keydiff", "ada_snapkv", "pyramidinfer", "rkv"]


@pytest.mark.parametrize("method", QUANTISED)
def test_method_reads_8_bit_floats(
    llama: Path, method: str, recording: Recording
) -> None:
    """Every layer has scales of its own, as a calibrated model's have."""
    settings = next(own for own in APART if own["method"] == method)
    config = {"kv_compression": settings}
    with engine(llama, additional_config=config, kv_cache_dtype="fp8") as llm:
        scales = calibrate(llm)
        model = DenseLlama(llama)
        model.stored = lambda x, layer, half: fp8_cut(x, scales[layer][half])
        _check(llm, model, settings, recording, 5e-3)


def _check(
    llm: Any,
    model: DenseLlama,
    settings: dict[str, Any],
    recording: Recording,
    tolerance: float,
) -> None:
    def decode(length: int, tokens: list[int], visible: list[torch.Tensor]) -> Any:
        return model.decode(model.prefill(prompt(length, seed=length)), tokens, visible)

    prompts = [prompt(n, seed=n) for n in LENGTHS]
    check(llm, prompts, decode, settings, recording, tolerance)


def check(
    llm: Any,
    prompts: Sequence[Any],
    decode: Callable[[int, list[int], list[torch.Tensor]], torch.Tensor],
    settings: dict[str, Any],
    recording: Recording,
    tolerance: float,
) -> None:
    """Memory, counters, kept sets and logits of prompts of several lengths.

    Args:
        llm: An engine that compresses.
        prompts: Of the `LENGTHS`.
        decode: A prompt's length, the answer, layer -> what it sees of the prompt,
            ``[kv_heads, prompt]`` booleans -> its log-probabilities.
        settings: The engine's.
        recording: Of what it keeps.
        tolerance: Of log-probabilities.
    """
    config = KVCompressionConfig.from_dict(settings)
    shrunk = {n: found for n in LENGTHS if (found := fits(config, config.method, n))}
    assert shrunk
    done = [(length, f) for length in shrunk for f in shrunk[length].values()]
    warm_up([config.scorer], attention(llm))  # as GPUs do; nothing is counted
    recording.kept.clear()
    before = free_blocks(llm)
    answers = generate(llm, prompts, 8)
    assert free_blocks(llm) == before
    counted = stats(llm)
    assert counted["compressions"] == len(done)
    assert counted["blocks_freed"] == sum(f.freed_blocks for _, f in done)
    assert counted["tokens_evicted"] == counted["blocks_freed"] * BLOCK
    assert counted["logical_tokens"] == sum(length for length, _ in done)
    assert counted["seconds"] > 0
    assert sum(counted["skipped"].values()) == len(LENGTHS) - len(shrunk)
    kept = iter(recording.kept)
    for length, found in shrunk.items():
        visible = [torch.ones(KV_HEADS, length, dtype=torch.bool)] * LAYERS
        # Groups come in the order of their layers.
        for tier, fitted in found.items():
            for layer in tier:
                mask = torch.zeros(KV_HEADS, length, dtype=torch.bool)
                for head, row in enumerate(next(kept)):
                    assert row.equal(row.unique())
                    mask[head, row] = True
                mask[:, fitted.end_block * BLOCK :] = True
                remaining = length - fitted.freed_blocks * BLOCK
                if config.scorer.uneven:
                    assert mask.sum() == remaining * KV_HEADS
                else:
                    assert (mask.sum(1) == remaining).all()
                check_promises(config.scorer, mask)
                visible[layer] = mask
        answer = answers[LENGTHS.index(length)]
        dense = decode(length, answer.tokens, visible)
        assert float((dense - answer.logprobs).abs().max()) < tolerance
    assert next(kept, None) is None


def check_promises(scorer: Scorer, mask: torch.Tensor) -> None:
    """What a method says of every prompt, of the tokens that are left of one."""
    length = mask.shape[1]
    assert mask[:, length - scorer.needs_queries :].all()
    if isinstance(scorer, StreamingLLM):
        assert mask[:, : scorer.sinks].all()
        recent = int(mask[0].sum()) - scorer.sinks
        assert mask[:, length - recent :].all()
    if isinstance(scorer, TOVA):
        assert (mask == mask[0]).all()
