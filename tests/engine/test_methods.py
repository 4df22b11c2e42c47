"""Every method of the matrix, through real vLLM."""

from pathlib import Path
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
)
from tests.matrix import METHODS
from vllm_kvcompress import stats
from vllm_kvcompress.budget import fit
from vllm_kvcompress.config import KVCompressionConfig

LENGTHS = [1000, 37, 512, 335]


@pytest.mark.parametrize("settings", METHODS, ids=str)
def test_method(llama: Path, settings: dict[str, Any], recording: Recording) -> None:
    config = KVCompressionConfig.from_dict(settings)
    fits = [fit(n, config.prompt_budget(n, BLOCK), BLOCK) for n in LENGTHS]
    shrunk = [
        (n, found) for n, found in zip(LENGTHS, fits, strict=True) if found.shrinks
    ]
    assert shrunk
    with engine(llama, additional_config={"kv_compression": settings}) as llm:
        before = free_blocks(llm)
        answers = generate(llm, [prompt(n, seed=n) for n in LENGTHS], 8)
        assert free_blocks(llm) == before
        counted = stats(llm)
    assert counted["compressions"] == len(shrunk)
    assert counted["blocks_freed"] == sum(found.freed_blocks for _, found in shrunk)
    assert counted["tokens_evicted"] == counted["blocks_freed"] * BLOCK
    assert counted["logical_tokens"] == sum(n for n, _ in shrunk)
    assert counted["seconds"] > 0
    assert sum(counted["skipped"].values()) == len(LENGTHS) - len(shrunk)
    model = DenseLlama(llama)
    kept = iter(recording.kept)
    for length, found in shrunk:
        visible = []
        for _ in range(model.layers):
            mask = torch.zeros(model.kv_heads, length, dtype=torch.bool)
            mask.scatter_(1, next(kept), True)
            mask[:, found.end_block * BLOCK :] = True
            assert (mask.sum(1) == length - found.freed_blocks * BLOCK).all()
            protected = config.scorer.needs_queries
            assert mask[:, length - protected :].all()
            if config.method == "streamingllm":
                sinks = config.scorer.sinks
                assert mask[:, :sinks].all()
                recent = int(mask[0].sum()) - sinks
                assert mask[:, length - recent :].all()
            visible.append(mask)
        answer = answers[LENGTHS.index(length)]
        dense = model.decode(
            model.prefill(prompt(length, seed=length)), answer.tokens, visible
        )
        assert float((dense - answer.logprobs).abs().max()) < 5e-4
