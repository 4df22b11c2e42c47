"""Cases for `test_v2`, run as a script: see `CASES`, results are JSON on stdout.

A runner has a process to itself, since `v2_harness` changes it for good.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# On the path for one import only: folders of the root would shadow packages.
sys.path[0] = str(Path(__file__).parents[2])
from tests.engine import v2_harness  # noqa: E402

del sys.path[0]

WINDOW, BUDGET = 16, 64
SETTINGS = {"method": "snapkv", "budget": BUDGET, "window": WINDOW, "kernel_size": 5}
LENGTHS = [330, 131, 64, 227, 290]
COUNT = 40
POOL = 18


class Kept:
    """What was kept of each request, from our own selection.

    Attributes:
        of: Request number -> layers in order, ``[kv_heads, tokens]``; a request
            compressed twice, before and after a preemption, has both.
    """

    def __init__(self) -> None:
        from vllm_kvcompress.engine import executor

        self.of: dict[int, list[list[list[int]]]] = {}
        self._request = 0
        compress = executor.CompressionExecutor._compress
        select = executor.select

        def recording_compress(this: Any, layer: Any, request_id: str, *rest: Any):
            # LLM numbers its requests and adds a random suffix.
            self._request = int(request_id.split("-")[0])
            return compress(this, layer, request_id, *rest)

        def recording_select(scores: Any, count: int) -> Any:
            kept = select(scores, count)
            self.of.setdefault(self._request, []).append(kept.tolist())
            return kept

        executor.CompressionExecutor._compress = recording_compress
        executor.select = recording_select


class Overlap:
    """The most steps that were scheduled and not yet processed."""

    def __init__(self, scheduler: Any) -> None:
        self.most, self._now = 0, 0
        schedule, update = scheduler.schedule, scheduler.update_from_output

        def counting_schedule(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self._now += 1
            self.most = max(self.most, self._now)
            return output

        def counting_update(*args: Any, **kwargs: Any) -> Any:
            self._now -= 1
            return update(*args, **kwargs)

        scheduler.schedule = counting_schedule
        scheduler.update_from_output = counting_update


class Cases:
    """Cases on one model with one runner."""

    def __init__(self, model: Path, switches: v2_harness.Switches) -> None:
        self._model, self._switches, self._kept = model, switches, Kept()

    @contextmanager
    def _engine(self, **kwargs: Any) -> Iterator[Any]:
        from tests.engine.conftest import engine

        settings = {
            "additional_config": {"kv_compression": SETTINGS},
            "max_model_len": 384,
            "max_num_batched_tokens": 96,
            "max_num_seqs": 8,
            "num_gpu_blocks_override": 100,
            **kwargs,
        }
        with engine(self._model, **settings) as llm:
            yield llm

    def _about(self, llm: Any) -> dict[str, Any]:
        """Which of vLLM's classes are at work."""
        core = llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        return {
            "runner": type(runner).__mro__[3].__module__,
            "scheduler": type(core.scheduler).__name__,
            "batch_queue": core.batch_queue is not None,
            "backends": [
                group.backend.__name__
                for groups in runner.attn_groups
                for group in groups
            ],
        }

    def _generate(
        self, llm: Any, lengths: list[int], count: int = COUNT
    ) -> dict[str, Any]:
        """Answers, and how far their logprobs are from the dense model's."""
        import torch

        from tests.dense import DenseLlama
        from tests.engine.conftest import BLOCK, free_blocks, generate, prompt, scheduler

        self._kept.of.clear()
        sched = scheduler(llm)
        overlap, preempted = Overlap(sched), []
        preempt = sched._preempt_request

        def counting_preempt(request: Any, *args: Any, **kwargs: Any) -> Any:
            preempted.append(request.request_id)
            return preempt(request, *args, **kwargs)

        sched._preempt_request = counting_preempt
        before = free_blocks(llm)
        answers = generate(llm, [prompt(n, seed=n) for n in lengths], count)
        leaked = before - free_blocks(llm)
        model = DenseLlama(self._model)
        kept = [layers for _, layers in sorted(self._kept.of.items())]
        results = []
        for length, answer in zip(lengths, answers, strict=True):
            end = length // BLOCK * BLOCK
            mine, visible = [], None
            if end > (BUDGET - length % BLOCK) // BLOCK * BLOCK:
                mine = kept.pop(0)
                visible = []
                for layer in mine[-model.layers :]:
                    mask = torch.ones(model.kv_heads, length, dtype=torch.bool)
                    mask[:, :end] = False
                    visible.append(mask.scatter(1, torch.tensor(layer), True))
            state = model.prefill(prompt(length, seed=length))
            dense = model.decode(state, answer.tokens, visible)
            results.append(
                {
                    "length": length,
                    "tokens": answer.tokens,
                    "cached": answer.cached,
                    "error": float((dense - answer.logprobs).abs().max()),
                    "kept": mine,
                }
            )
        return {
            "answers": results,
            "leaked": leaked,
            "overlap": overlap.most,
            "preemptions": len(preempted),
        }

    def ample(self, *, async_scheduling: bool) -> dict[str, Any]:
        """Room for all; then prefix hits; then chunks smaller than the window."""
        from tests.engine.conftest import scheduler

        self._switches.async_scheduling = async_scheduling
        with self._engine() as llm:
            results = {
                "about": self._about(llm),
                "first": self._generate(llm, LENGTHS),
                "hits": self._generate(llm, [227, 330], 8),
            }
            scheduler(llm).max_num_scheduled_tokens = 11
            scheduler(llm).reset_prefix_cache()
            results["small_chunks"] = self._generate(llm, [131], 8)
        return results

    def tight(self, *, async_scheduling: bool) -> dict[str, Any]:
        """Too few blocks for all: requests are preempted and resume."""
        self._switches.async_scheduling = async_scheduling
        with self._engine(num_gpu_blocks_override=POOL) as llm:
            return {"about": self._about(llm), "first": self._generate(llm, LENGTHS)}

    def gpu_attention(self) -> dict[str, Any]:
        """The GPU's Triton kernels, interpreted."""
        self._switches.async_scheduling = True
        self._switches.attention = "TRITON_ATTN"
        with self._engine() as llm:
            return {
                "about": self._about(llm),
                "first": self._generate(llm, [131, 97], 4),
            }


def main(runner: str, model: str) -> None:
    """Run a runner's cases."""
    import time

    start = time.time()
    def lap(n):
        print(n, time.time() - start, file=sys.stderr)
    cases = Cases(Path(model), v2_harness.boot(v2=runner != "v1"))
    lap("boot")
    if runner == "triton":
        results = {"gpu_attention": cases.gpu_attention()}
    else:
        results = {}
        for mode in (False, True):
            for case in (cases.ample, cases.tight):
                results[f"{case.__name__}{'_async' * mode}"] = case(async_scheduling=mode)
                lap(case.__name__)
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
