"""Tensor parallelism over vLLM's Ray executor: its workers compress as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SETTINGS = {"method": "keydiff", "budget": 64}
# vLLM's CPU platform has no name for its devices in Ray, and is refused there. Here it
# borrows the GPUs', of which Ray is told that there are two; the rest is vLLM's own.
SCRIPT = """
import json, sys

def name_devices():
    from vllm.platforms import current_platform

    type(current_platform).ray_device_key = "GPU"

def main(model, settings, backend, size):
    import torch

    if backend == "ray":
        import ray

        name_devices()
        ray.init(
            num_cpus=2,
            num_gpus=2,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            runtime_env={"worker_process_setup_hook": name_devices},
        )
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        block_size=32,
        num_gpu_blocks_override=100,
        tensor_parallel_size=int(size),
        distributed_executor_backend=backend,
        additional_config={"kv_compression": json.loads(settings)},
    )
    source = torch.Generator().manual_seed(0)
    prompts = [
        {"prompt_token_ids": torch.randint(0, 512, (n,), generator=source).tolist()}
        for n in (300, 90)
    ]
    params = SamplingParams(
        max_tokens=8, temperature=0.0, detokenize=False, ignore_eos=True
    )
    outputs = llm.generate(prompts, params, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    workers = llm.collective_rpc("kv_compression_stats")
    executor = type(llm.llm_engine.model_executor).__name__
    print("@" + json.dumps([tokens, [w["blocks_freed"] for w in workers], executor]))

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


def _run(tmp_path: Path, model: Path, backend: str, size: int) -> list[Any]:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    given = [str(model), json.dumps(SETTINGS), backend, str(size)]
    cores = sorted(os.sched_getaffinity(0))
    binding = "|".join(str(cores[worker % len(cores)]) for worker in range(size))
    done = subprocess.run(
        [sys.executable, str(script), *given],
        env={
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": binding,
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [ln for ln in done.stdout.splitlines() if ln.startswith("@")]
    assert len(lines) == 1, done.stderr[-4000:]
    return json.loads(lines[0][1:])


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(1200)
def test_workers_of_ray_compress(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed; pip install ray")
    alone = _run(tmp_path, llama, "uni", 1)
    shared = _run(tmp_path, llama, "ray", 2)
    assert alone[1][0] > 0
    assert shared == [alone[0], alone[1] * 2, "RayExecutorV2"]
