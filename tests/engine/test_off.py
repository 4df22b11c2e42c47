"""Without the flag nothing of vLLM is replaced, and no token changes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.engine.conftest import engine, generate, prompt, scheduler
from vllm_kvcompress import stats

LENGTHS = [40, 200, 333]
SCRIPT = """
import json, sys
from tests.engine.conftest import engine, generate, prompt
with engine(sys.argv[1]) as llm:
    answers = generate(llm, [prompt(n, seed=n) for n in json.loads(sys.argv[2])], 16)
print(json.dumps([[a.tokens, a.logprobs.tolist()] for a in answers]))
"""


def _fresh(model: Path, **environment: str) -> Any:
    """Answers of stock vLLM in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model), json.dumps(LENGTHS)],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout.splitlines()[-1])


def test_identical_with_plugin_without_and_under_budget(llama: Path) -> None:
    without = _fresh(llama, VLLM_PLUGINS="")
    assert _fresh(llama) == without
    prompts = [prompt(n, seed=n) for n in LENGTHS]
    settings = {"method": "snapkv", "budget": 400}
    with engine(llama, additional_config={"kv_compression": settings}) as llm:
        generous = generate(llm, prompts, 16)
        assert stats(llm)["compressions"] == 0
        assert stats(llm)["skipped"] == {"short": 3}
    assert [[a.tokens, a.logprobs.tolist()] for a in generous] == without


def test_classes_are_vllms_own(llama: Path) -> None:
    """Also in a process where another engine compressed."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.cpu_worker import CPUWorker

    settings = {"method": "snapkv", "budget": 64, "window": 16}
    with engine(llama, additional_config={"kv_compression": settings}) as llm:
        generate(llm, [prompt(300)], 4)
        assert stats(llm)["compressions"] == 1
        assert type(scheduler(llm)) is not Scheduler
    with engine(llama) as llm:
        generate(llm, [prompt(300)], 4)
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
        runner = worker.worker.model_runner
        layers = runner.compilation_config.static_forward_context.values()
        attention = [layer for layer in layers if type(layer) is Attention]
        assert type(scheduler(llm)) is Scheduler
        assert type(worker.worker) is CPUWorker
        assert type(runner) is CPUModelRunner
        assert attention
        assert all(layer.attn_backend is CPUAttentionBackend for layer in attention)
        assert all("get_kv_cache_spec" not in vars(layer) for layer in attention)


def test_wrapped_functions_alone_are_the_arguments(llama: Path) -> None:
    """In a process that never compresses, only EngineArgs is wrapped."""
    script = f"""
from vllm import LLM
from vllm_kvcompress.engine import compat
LLM({str(llama)!r}, skip_tokenizer_init=True, dtype="float32", max_model_len=256,
    enforce_eager=True, num_gpu_blocks_override=16)
def ours(seam):
    found = seam.resolve()
    found = found.__init__ if isinstance(found, type) else found
    code = getattr(found, "__code__", None)
    return code is not None and "vllm_kvcompress" in code.co_filename
wrapped = [s.target for s in compat.SEAMS if ours(s)]
print(wrapped)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    wrapped = result.stdout.splitlines()[-1]
    assert wrapped == str(
        [
            "vllm.engine.arg_utils:EngineArgs.add_cli_args",
            "vllm.engine.arg_utils:EngineArgs.create_engine_config",
            "vllm.engine.arg_utils:EngineArgs",  # its keywords
        ]
    )
