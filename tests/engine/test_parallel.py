"""Tensor parallelism: two workers compress as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dense import DenseLlama
from tests.engine import test_head_pages
from tests.engine.conftest import save_lopsided

LENGTHS = [500, 90, 231]
SETTINGS: dict[str, dict[str, Any]] = {
    "snapkv": {"budget": 128, "window": 16, "decode": {"interval": 48}},
    "tova": {"budget": 128},
    "minicache": {
        "start_layer": 0,
        "over": {"method": "snapkv", "window": 16},
        "budget": 128,
        "interval": 32,
    },
    "pyramidinfer": {"decay_ratio": 0.6, "min_context": 16, "layers_per_tier": 1},
}
SCRIPT = """
import json, sys
import torch
import vllm_kvcompress

def main(model, size, settings, lengths):
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=1024,
        enforce_eager=True,
        block_size=32,
        num_gpu_blocks_override=200,
        tensor_parallel_size=int(size),
        additional_config={"kv_compression": json.loads(settings)},
    )
    source = torch.Generator().manual_seed(0)
    prompts = [
        {"prompt_token_ids": torch.randint(0, 512, (n,), generator=source).tolist()}
        for n in json.loads(lengths)
    ]
    params = SamplingParams(
        max_tokens=100, temperature=0.0, detokenize=False, ignore_eos=True, logprobs=0
    )
    outputs = llm.generate(prompts, params, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    tokens = [list(answer.token_ids) for answer in answers]
    chosen = [
        [row[token].logprob for token, row in zip(answer.token_ids, answer.logprobs)]
        for answer in answers
    ]
    counted = vllm_kvcompress.stats(llm)["compressions"]
    print("@" + json.dumps([tokens, counted, chosen]))

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


def _run(script: Path, model: Path, size: int, settings: dict[str, Any]) -> Any:
    cores = sorted(os.sched_getaffinity(0))
    binding = "|".join(str(cores[worker % len(cores)]) for worker in range(size))
    given = [str(model), str(size), json.dumps(settings), json.dumps(LENGTHS)]
    done = subprocess.run(
        [sys.executable, str(script), *given],
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": binding},
        cwd=script.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [ln for ln in done.stdout.splitlines() if ln.startswith("@")]
    return json.loads(line[1:])


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("method", SETTINGS)
def test_two_workers_answer_as_one(llama: Path, tmp_path: Path, method: str) -> None:
    settings = {"method": method, **SETTINGS[method]}
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    alone, shared = (_run(script, llama, size, settings) for size in (1, 2))
    assert alone[1] > 1
    assert shared[:2] == alone[:2]


@pytest.mark.slow
@pytest.mark.vllm
def test_each_worker_deals_out_to_its_own_heads(tmp_path: Path) -> None:
    script, model = tmp_path / "run.py", tmp_path / "model"
    script.write_text(SCRIPT)
    dense = DenseLlama(save_lopsided(model, kv_heads=4))
    settings = {**test_head_pages.SETTINGS, "request_methods": []}
    found = _run(script, model, 2, settings)
    source = torch.Generator().manual_seed(0)
    for length, tokens, chosen in zip(LENGTHS, found[0], found[2], strict=True):
        prompt = torch.randint(0, 512, (length,), generator=source).tolist()
        state = dense.prefill(prompt)
        masks = [
            test_head_pages.visible(dense, state, tier_size=1, ranks=ranks)
            for ranks in (1, 2)
        ]
        expected = dense.decode(state, tokens, masks[1])
        expected = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert float((expected - torch.tensor(chosen)).abs().max()) < 5e-4
        if length == LENGTHS[0]:
            each, both = (torch.stack(m or []).sum(2) for m in masks)
            assert not each.equal(both)
            assert len(both[0, 2:].unique()) == 2
