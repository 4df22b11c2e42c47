"""Tensor parallelism: two workers compress as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SETTINGS: dict[str, dict[str, Any]] = {
    "snapkv": {"budget": 128, "window": 16, "decode": {"interval": 48}},
    "tova": {"budget": 128},
    "pyramidinfer": {"decay_ratio": 0.6, "min_context": 16, "layers_per_tier": 1},
}
SCRIPT = """
import json, sys
import torch
import vllm_kvcompress

def main(model, size, settings):
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
        for n in (500, 90, 231)
    ]
    params = SamplingParams(
        max_tokens=100, temperature=0.0, detokenize=False, ignore_eos=True
    )
    outputs = llm.generate(prompts, params, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    print("@" + json.dumps([tokens, vllm_kvcompress.stats(llm)["compressions"]]))

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


def _run(script: Path, model: Path, size: int, settings: dict[str, Any]) -> Any:
    cores = sorted(os.sched_getaffinity(0))
    binding = "|".join(str(cores[worker % len(cores)]) for worker in range(size))
    done = subprocess.run(
        [sys.executable, str(script), str(model), str(size), json.dumps(settings)],
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
    assert shared == alone
