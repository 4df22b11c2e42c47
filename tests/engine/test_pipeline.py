"""Pipeline parallelism: two stages keep and answer what one does.

vLLM's CPU worker runs stages only of models that are not run eagerly: without a warm-up
it never makes room for what the stage before hands over.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

METHODS = ["keydiff", "streamingllm", "tova"]
SETTINGS: dict[str, dict[str, Any]] = {
    "snapkv": {"request_methods": METHODS, "decode": {"interval": 48}},
    "pyramidkv": {"layers_per_tier": 1, "request_methods": ["snapkv"]},
    "minicache": {"start_layer": 0, "over": {"method": "snapkv", "window": 16}},
}
# With snapkv so few that requests are preempted. A request of minicache that waits for
# private blocks goes on with its whole cache, and how long depends on the timing.
BLOCKS = {"snapkv": 22, "pyramidkv": 80, "minicache": 200}
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "minicache": ({"start_layer": 1}, ["merges the layers 1, 2", "start_layer"]),
    "ada_snapkv": (
        {"budget": 128, "layers_per_tier": 4},
        ["one lot of pages to the layers 0, 1, 2, 3", "layers_per_tier"],
    ),
}
SCRIPT = """
import json, sys
import torch
import vllm_kvcompress

def record(worker):
    from vllm_kvcompress.engine import executor, merging

    compression = worker.model_runner.compression
    layers, compress, merge = [], compression._compress, executor.merge_groups
    compression.seen = []

    def compressing(group, request_id, row, directive):
        layers[:] = [
            (request_id, directive.num_tokens, layer.compressed_index)
            for layer in group.layers
        ]
        compress(group, request_id, row, directive)

    def selecting(scores, count, select=executor.select):
        kept = select(scores, count)
        compression.seen.append((*layers.pop(0), kept.tolist()))
        return kept

    def merging_groups(scorer, request_id, pairs, rows, directives, block_size):
        blocks = merge(scorer, request_id, pairs, rows, directives, block_size)
        for pair in pairs:
            numbers = [layer.compressed_index for layer in pair]
            tokens = directives[1].num_tokens
            compression.seen.append((request_id, tokens, numbers, len(blocks)))
        return blocks

    compression._compress = compressing
    executor.select = selecting
    executor.merge_groups = merging_groups

def seen(worker):
    return worker.model_runner.compression.seen

def fail(worker):
    if worker.rank == 0:
        worker.model_runner.compression._execute = None

def main(model, size, settings, blocks, breaks):
    from vllm import LLM, SamplingParams

    settings = json.loads(settings)
    llm = LLM(
        model,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=448,
        block_size=32,
        num_gpu_blocks_override=int(blocks),
        compilation_config={"backend": "eager"},
        pipeline_parallel_size=int(size),
        disable_log_stats=False,
        additional_config={"kv_compression": settings},
    )
    llm.collective_rpc(record)
    source = torch.Generator().manual_seed(0)
    lengths = [64, 280, 240, 210, 200, 30, 40, 50, 60]
    drawn = [torch.randint(0, 512, (n,), generator=source).tolist() for n in lengths]
    prompts = [{"prompt_token_ids": drawn[0] + tail} for tail in drawn[1:]]
    methods = [settings["method"], *settings.get("request_methods", [])]
    params = [
        SamplingParams(
            max_tokens=64,
            temperature=0.0,
            detokenize=False,
            ignore_eos=True,
            extra_args={"kv_compression": methods[i % len(methods)]},
        )
        for i in range(len(prompts))
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    stages = [
        sorted({
            json.dumps([int(name.partition("-")[0]), *rest])
            for name, *rest in stage
        })
        for stage in llm.collective_rpc(seen)
    ]
    counts = {found.name: found.value for found in llm.get_metrics()
              if hasattr(found, "value")}
    print("@" + json.dumps({
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "cached": [output.num_cached_tokens for output in outputs],
        "preemptions": counts["vllm:num_preemptions"],
        "compressions": counts["vllm:kv_compression_compressions"],
        "stages": stages,
    }), flush=True)
    if breaks == "breaks":
        llm.collective_rpc(fail)
        llm.generate(prompts[:1], params[:1], use_tqdm=False)

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


def _run(
    tmp_path: Path,
    model: Path,
    size: int,
    settings: dict[str, Any],
    blocks: int = 200,
    breaks: bool = False,
) -> subprocess.CompletedProcess:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    cores = sorted(os.sched_getaffinity(0))
    binding = "|".join(str(cores[worker % len(cores)]) for worker in range(size))
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": binding,
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    words = [
        str(model),
        str(size),
        json.dumps(settings),
        str(blocks),
        "breaks" * breaks,
    ]
    return subprocess.run(
        [sys.executable, str(script), *words],
        env={**os.environ, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


def _found(done: subprocess.CompletedProcess) -> dict[str, Any]:
    lines = [ln for ln in done.stdout.splitlines() if ln.startswith("@")]
    assert len(lines) == 1, done.stderr[-4000:]
    return json.loads(lines[0][1:])


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("method", SETTINGS)
def test_two_stages_answer_as_one(
    deep_llama: Path, tmp_path: Path, method: str
) -> None:
    settings = {"method": method, "budget": 128, **SETTINGS[method]}
    breaks = method == "snapkv"
    runs = [
        _run(tmp_path, deep_llama, size, settings, BLOCKS[method], breaks)
        for size in (1, 2)
    ]
    alone, staged = map(_found, runs)
    assert staged["tokens"] == alone["tokens"]
    for found in (alone, staged):
        assert found["preemptions"] > 0 or method != "snapkv"
        assert any(found["cached"])
        assert found["compressions"] > 0
    below, above = staged["stages"]
    assert below
    assert above
    assert sorted(below + above) == alone["stages"][0]
    for run in runs[: 2 * breaks]:
        assert run.returncode != 0
        assert "'NoneType' object is not callable" in run.stderr + run.stdout


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", REFUSED)
def test_layers_that_need_one_another_share_a_stage(
    deep_llama: Path, tmp_path: Path, method: str
) -> None:
    settings, words = REFUSED[method]
    done = _run(tmp_path, deep_llama, 2, {"method": method, **settings})
    assert done.returncode != 0
    for word in [f"kv_compression: method={method}", *words, "VLLM_PP_LAYER_PARTITION"]:
        assert word in done.stdout + done.stderr
