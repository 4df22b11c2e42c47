"""One arm in a process of its own: build vLLM, run prompts, write what it did.

``python -m vllm_kvcompress.tools.engine_run JOB.json RESULT.json`` (see `arms`).
The engine lives in this process and is driven step by step, so the scheduler can
be read between steps. The same code runs stock and compressed vLLM.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vllm_kvcompress

from ..config import KEY, KVCompressionConfig
from .bench.shapes import Prompts
from .trace import Step, measure

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

PROGRESS = "@progress"


@dataclass(frozen=True)
class _Seen:
    """Where a request stood at one moment."""

    computed: int
    outputs: int
    decoding: bool
    finished: bool

    @classmethod
    def of(cls, request: "Request") -> "_Seen":
        outputs = request.num_output_tokens
        # A decoding request lacks only the KV of its newest token. A preempted
        # one has outputs too, but must compute its prompt again.
        decoding = outputs > 0 and request.num_computed_tokens >= request.num_tokens - 1
        return cls(
            request.num_computed_tokens, outputs, decoding, request.is_finished()
        )


def _observe(
    before: Mapping[str, _Seen],
    after: Mapping[str, _Seen],
    *,
    start: float,
    end: float,
    running: int,
    held_blocks: int,
) -> Step:
    """Derive one step from the requests' states around it."""
    scheduled = [r for r in after if after[r].computed > before[r].computed]
    made = {r: after[r].outputs - before[r].outputs for r in after}
    left = sum(after[r].finished and not before[r].finished for r in after)
    return Step(
        seconds=end - start,
        end=end,
        prompt=any(not before[r].decoding for r in scheduled),
        tokens={r: n for r, n in made.items() if n},
        running=running + left,
        held_blocks=held_blocks,
    )


def run_prompts(
    llm: "LLM",
    prompts: Prompts,
    params: "SamplingParams",
    report: Callable[[float], None] = lambda fraction: None,
) -> tuple[list[Step], list["Request"]]:
    """Add all prompts at once and step until every one is finished.

    Args:
        llm: An in-process engine.
        prompts: Token ids.
        params: The same for all prompts.
        report: Told the share of tokens done after each step.
    """
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    usable = pool.num_gpu_blocks - 1  # block 0 is vLLM's null block
    total = sum(len(prompt) + (params.max_tokens or 0) for prompt in prompts)
    origin = time.perf_counter()
    ids = [
        engine.add_request(str(i), {"prompt_token_ids": list(prompt)}, params)
        for i, prompt in enumerate(prompts)
    ]
    requests = {name: scheduler.requests[name] for name in ids}
    seen = {name: _Seen.of(request) for name, request in requests.items()}
    steps = []
    while engine.has_unfinished_requests():
        start = time.perf_counter() - origin
        engine.step()
        end = time.perf_counter() - origin
        now = {name: _Seen.of(request) for name, request in requests.items()}
        steps.append(
            _observe(
                seen,
                now,
                start=start,
                end=end,
                running=len(scheduler.running),
                held_blocks=usable - pool.get_num_free_blocks(),
            )
        )
        seen = now
        report(sum(state.computed for state in now.values()) / total)
    return steps, list(requests.values())


def _check_proof(
    config: KVCompressionConfig,
    passes: Sequence[Prompts],
    block_size: int,
    layers: int,
    compressions: int,
) -> None:
    """Raise if prompts should have shrunk and none did."""
    tiers = config.tiers(layers)
    for length in {len(prompt) for prompts in passes for prompt in prompts}:
        fits = config.tier_fits(config.method, tiers, length, block_size)
        if not compressions and any(fit.shrinks for fit in fits.values()):
            raise RuntimeError(
                f"prompts of {length} tokens should have shrunk, "
                "yet the engine compressed none"
            )


def execute(job: Mapping[str, Any]) -> dict[str, Any]:
    """Run a job as `arms.run_arm` writes it.

    Raises:
        RuntimeError: A compressed engine that should have compressed did not.
    """
    import torch
    from vllm import LLM, SamplingParams

    llm = LLM(**job["llm"])
    params = SamplingParams(
        temperature=0.0,
        max_tokens=job["max_tokens"],
        ignore_eos=True,
        detokenize=False,
    )
    cache = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    block_size = llm.llm_engine.vllm_config.cache_config.block_size
    block_bytes = cache.kv_cache_tensors[0].size // cache.num_blocks
    settings = job["llm"].get("additional_config", {}).get(KEY)

    run_prompts(llm, job["warmup"], params)
    before = vllm_kvcompress.stats(llm) if settings else None
    measures, outputs = [], []
    for number, prompts in enumerate(job["passes"]):
        llm.reset_prefix_cache()
        report = _Reporter(number, len(job["passes"]))
        steps, requests = run_prompts(llm, prompts, params, report)
        outputs.append([list(request.output_token_ids) for request in requests])
        preemptions = sum(request.num_preemptions for request in requests)
        measures.append(
            measure(steps, block_bytes=block_bytes, preemptions=preemptions)
        )
    after = vllm_kvcompress.stats(llm) if settings else None
    if after and "kv_layers" in after and after["kv_layers"] == after["layers"]:
        raise RuntimeError("every layer stores KV, so there is nothing to measure")
    if before and after and "compressions" in after:
        done = after["compressions"] - before["compressions"]
        config = KVCompressionConfig.from_dict(settings)
        layers = llm.llm_engine.model_config.hf_text_config.num_hidden_layers
        _check_proof(config, job["passes"], block_size, layers, done)
    return {
        "measures": measures,
        "outputs": outputs,
        "compression": after,
        "engine": {
            "threads": torch.get_num_threads(),
            "block_size": block_size,
            "block_bytes": block_bytes,
            "token_bytes": token_bytes(cache),
        },
    }


def token_bytes(cache: "KVCacheConfig") -> int:
    """KV bytes that a request's every token takes, beyond windows and states."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    groups = [
        (group.kv_cache_spec, group.layer_names) for group in cache.kv_cache_groups
    ]
    return sum(
        len(names) * spec.page_size_bytes // spec.block_size
        for spec, names in groups
        if isinstance(spec, FullAttentionSpec)
    )


class _Reporter:
    """Prints progress for the parent, a few times a second."""

    def __init__(self, number: int, passes: int) -> None:
        self._number, self._passes, self._last = number, passes, 0.0

    def __call__(self, fraction: float) -> None:
        now = time.monotonic()
        if now - self._last > 0.2:
            self._last = now
            print(PROGRESS, (self._number + fraction) / self._passes, flush=True)


def main() -> int:
    """Read the job, run it, write the result or the reason why there is none."""
    job = json.loads(Path(sys.argv[1]).read_text())
    try:
        result = execute(job)
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    Path(sys.argv[2]).write_text(json.dumps(result))
    return int("error" in result)


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    sys.exit(main())
