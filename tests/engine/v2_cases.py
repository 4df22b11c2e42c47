"""Cases for `test_v2`, run as a script: results are JSON in a file.

Every runner has a process to itself, since `v2_harness` changes it for good.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# On the path for one import only: folders of the root would shadow packages.
sys.path[0] = str(Path(__file__).parents[2])
from tests.engine import v2_harness  # noqa: E402
from tests.quantised import FORMATS, fp8  # noqa: E402

del sys.path[0]

WINDOW = 16
SETTINGS = {"method": "snapkv", "budget": 64, "window": WINDOW, "kernel_size": 5}
UNEVEN = {**SETTINGS, "method": "ada_snapkv", "budget": 128, "floor": 0.0}
MERGING = {"method": "minicache", "start_layer": 1, "interval": 2, "retain": 0.25}
LENGTHS = [330, 131, 64, 227, 290]
COUNT = 40
TIGHT_POOL = 15


class Kept:
    """What was kept of each request, from our own selection.

    Attributes:
        of: Request number -> layers in order, ``[kv_heads, tokens]``; a request
            that is preempted later and compressed again has them twice. Rows differ
            in length where KV heads do.
    """

    def __init__(self) -> None:
        from vllm_kvcompress.engine import executor, uneven

        self.of: dict[int, list[list[list[int]]]] = {}
        self._request = 0
        compress = executor.CompressionExecutor._compress
        select, select_each = executor.select, uneven.select_each

        def recording_compress(this: Any, layer: Any, request_id: str, *rest: Any):
            # LLM numbers its requests and adds a random suffix.
            self._request = int(request_id.split("-")[0])
            return compress(this, layer, request_id, *rest)

        def recording_select(scores: Any, count: int) -> Any:
            kept = select(scores, count)
            self.of.setdefault(self._request, []).append(kept.tolist())
            return kept

        def recording_select_each(scores: Any, counts: Any) -> Any:
            kept = select_each(scores, counts)
            layer = [head.tolist() for head in kept]
            self.of.setdefault(self._request, []).append(layer)
            return kept

        executor.CompressionExecutor._compress = recording_compress
        executor.select = recording_select
        uneven.select_each = recording_select_each


class Watch:
    """Counts what an engine does.

    Attributes:
        overlap: The most steps that were scheduled and not yet processed.
        preempted: Preemptions.
        compressed: Steps that compressed something.
        one_token_ends: Steps in which a window's last token came alone.
        hidden: Steps with an observed query that may run as a decode's full CUDA
            graph, where Python sees no query.
        clashes: Block-table entries written twice in one launch (V2), in which
            a GPU keeps no order.
    """

    def __init__(self, llm: Any) -> None:
        core = llm.llm_engine.engine_core.engine_core
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.scheduler = core.scheduler
        self.batch_queue = core.batch_queue is not None
        self.overlap = self.preempted = self.compressed = 0
        self.one_token_ends = self.hidden = self.clashes = 0
        self._in_flight = 0
        self._observes = False
        self._wrap(self.scheduler, "schedule", after=self._scheduled)
        self._wrap(self.scheduler, "update_from_output", after=self._processed)
        self._wrap(self.scheduler, "_preempt_request", after=self._preempt)
        if hasattr(self.runner, "gather_batch_req_state"):
            self._wrap(self.runner, "gather_batch_req_state", after=self._gathered)
            for table in self.runner.block_tables.block_tables:
                self._count_clashes(table)
        else:
            dispatcher = self.runner.cudagraph_dispatcher
            self._wrap(dispatcher, "dispatch", after=self._dispatched)

    @staticmethod
    def _wrap(owner: Any, name: str, after: Any) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            after(result, **kwargs)
            return result

        setattr(owner, name, wrapped)

    def _scheduled(self, output: Any, **_: Any) -> None:
        self._in_flight += 1
        self.overlap = max(self.overlap, self._in_flight)
        plan = getattr(output, "kv_compression", None)
        observed = plan.observe if plan else {}
        self.compressed += bool(plan and plan.compress)
        self._observes = bool(observed)
        self.one_token_ends += any(
            output.num_scheduled_tokens[r] == 1 and r in plan.compress for r in observed
        )

    def _processed(self, *_: Any, **__: Any) -> None:
        self._in_flight -= 1

    def _preempt(self, *_: Any, **__: Any) -> None:
        self.preempted += 1

    def _gathered(self, result: Any, **_: Any) -> None:
        self.hidden += self._observes and result[1] is not None

    def _dispatched(self, _: Any, uniform_decode: bool, **__: Any) -> None:
        self.hidden += self._observes and uniform_decode

    def _count_clashes(self, table: Any) -> None:
        apply_write = table.apply_write

        def counting_apply_write() -> None:
            ends = table._staged_write_cu_lens
            written = [
                (row, first + offset)
                for row, first, (begin, end) in zip(
                    table._staged_write_indices,
                    table._staged_write_starts,
                    itertools.pairwise([0, *ends]),
                    strict=True,
                )
                for offset in range(end - begin)
            ]
            self.clashes += len(written) - len(set(written))
            apply_write()

        table.apply_write = counting_apply_write

    def summary(self) -> dict[str, Any]:
        """The counts, and which classes are at work."""
        groups = [group for groups in self.runner.attn_groups for group in groups]
        return {
            # Ours, its two mix-ins, then vLLM's.
            "runner": type(self.runner).__mro__[3].__module__,
            "scheduler": type(self.scheduler).__name__,
            "backends": [group.backend.__name__ for group in groups],
            "batch_queue": self.batch_queue,
            "overlap": self.overlap,
            "preempted": self.preempted,
            "one_token_ends": self.one_token_ends,
            "hidden": self.hidden,
            "clashes": self.clashes,
        }


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

    def _answers(
        self, llm: Any, lengths: list[int], count: int = COUNT
    ) -> list[dict[str, Any]]:
        """Answers, and how far their logprobs are from the dense model's."""
        import torch

        from tests.dense import DenseLlama
        from tests.engine.conftest import BLOCK, free_blocks, generate, prompt

        self._kept.of.clear()
        before = free_blocks(llm)
        answers = generate(llm, [prompt(n, seed=n) for n in lengths], count)
        assert free_blocks(llm) == before, "blocks leaked"
        model = DenseLlama(self._model)
        settings = llm.llm_engine.vllm_config.additional_config
        budget = settings["kv_compression"]["budget"]
        recorded = iter([layers for _, layers in sorted(self._kept.of.items())])
        results = []
        for length, answer in zip(lengths, answers, strict=True):
            end = length // BLOCK * BLOCK
            kept, visible = [], None
            if end > (budget - length % BLOCK) // BLOCK * BLOCK:
                kept = next(recorded)
                visible = []
                for layer in kept[-model.layers :]:
                    mask = torch.ones(model.kv_heads, length, dtype=torch.bool)
                    mask[:, :end] = False
                    for head, row in enumerate(layer):
                        mask[head, row] = True
                    visible.append(mask)
            state = model.prefill(prompt(length, seed=length))
            dense = model.decode(state, answer.tokens, visible)
            results.append(
                {
                    "length": length,
                    "tokens": answer.tokens,
                    "cached": answer.cached,
                    "error": float((dense - answer.logprobs).abs().max()),
                    "kept": kept,
                }
            )
        assert next(recorded, None) is None, "a prompt was compressed unasked"
        return results

    def ample(self) -> dict[str, Any]:
        """Chunks, prefix hits, straddled windows and aborts, with room for all."""
        from vllm import SamplingParams

        from tests.engine.conftest import prompt

        self._switches.async_scheduling = False
        with self._engine() as llm:
            watch = Watch(llm)
            results = {
                "all": self._answers(llm, LENGTHS),
                "hits": self._answers(llm, [227, 330], 8),
            }
            # The next request takes over the slot of one that was just compressed;
            # by its prefix hit it fills the same entries in one go.
            tokens = SamplingParams(max_tokens=8, ignore_eos=True, detokenize=False)
            gone = llm.llm_engine.add_request(
                "99", {"prompt_token_ids": prompt(300)}, tokens
            )
            compressed = watch.compressed
            while watch.compressed == compressed:
                llm.llm_engine.step()
            llm.llm_engine.abort_request([gone], internal=True)
            results["successor"] = self._answers(llm, [290], 8)
            # A window of 16 tokens in chunks of 15 and 1.
            watch.scheduler.max_num_scheduled_tokens = WINDOW - 1
            watch.scheduler.reset_prefix_cache()
            results["straddled"] = self._answers(llm, [131], 8)
            return {**watch.summary(), **results}

    def tight(
        self, *, async_scheduling: bool, settings: dict[str, Any] = SETTINGS
    ) -> dict[str, Any]:
        """Too few blocks for all: requests are preempted and resume."""
        self._switches.async_scheduling = async_scheduling
        # Where layers differ, each has blocks of its own, and here keeps more.
        blocks = 26 if settings is UNEVEN else TIGHT_POOL
        config = {"kv_compression": settings}
        with self._engine(
            additional_config=config, num_gpu_blocks_override=blocks
        ) as llm:
            watch = Watch(llm)
            return {"all": self._answers(llm, LENGTHS), **watch.summary()}

    def courses(self, *, async_scheduling: bool) -> dict[str, Any]:
        """Budgets by layer, compressed again and again while reading and decoding."""
        from tests.engine.conftest import free_blocks, generate, prompt
        from vllm_kvcompress import stats

        self._switches.async_scheduling = async_scheduling
        settings = {
            **SETTINGS,
            "method": "pyramidkv",
            "layers_per_tier": 1,
            "prefill": "incremental",
            "prefill_interval": 96,
            "decode": {"interval": 16},
        }
        config = {"kv_compression": settings}
        self._kept.of.clear()
        with self._engine(additional_config=config, num_gpu_blocks_override=60) as llm:
            watch, before = Watch(llm), free_blocks(llm)
            answers = generate(llm, [prompt(n, seed=n) for n in LENGTHS], COUNT)
            assert free_blocks(llm) == before, "blocks leaked"
            return {
                "tokens": [answer.tokens for answer in answers],
                "compressions": stats(llm)["compressions"],
                **watch.summary(),
            }

    def triton(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The GPU's Triton attention kernels, interpreted."""
        self._switches.attention = "TRITON_ATTN"
        config = {"kv_compression": settings}
        with self._engine(additional_config=config, max_num_batched_tokens=128) as llm:
            watch = Watch(llm)
            return {"all": self._answers(llm, [231, 192], 4), **watch.summary()}

    def merging(self, kv_cache_dtype: str) -> dict[str, Any]:
        """Pairs of layers share pages of Triton's kernels, of any format."""
        from tests.dense import DenseLlama
        from tests.engine.conftest import (
            BLOCK,
            block_bytes,
            blocks_held,
            calibrate,
            free_blocks,
            generate,
            prompt,
        )
        from tests.merged import Merges
        from vllm_kvcompress.engine.layers import scale_share

        self._switches.attention = "TRITON_ATTN"
        config = {"kv_compression": MERGING}
        # Two whole blocks, one retained and one merged; then a third one merges.
        length, count = 94, 6
        # A block is too short to merge: all is vLLM's own.
        short = [prompt(20, seed=20)]
        with self._engine(additional_config={}, kv_cache_dtype=kv_cache_dtype) as llm:
            calibrate(llm)
            (own,) = generate(llm, short, 2)
        with self._engine(
            additional_config=config,
            kv_cache_dtype=kv_cache_dtype,
            max_num_batched_tokens=128,
        ) as llm:
            watch, before, scales = Watch(llm), free_blocks(llm), calibrate(llm)
            (unmerged,) = generate(llm, short, 2)
            held = blocks_held(llm, prompt(100, seed=100))
            (answer,) = generate(llm, [prompt(length)], count)
            model = DenseLlama(self._model)
            model.stored = FORMATS[kv_cache_dtype]
            if kv_cache_dtype == "fp8":
                model.stored = lambda x, layer, half: fp8(x, scales[layer][half])
            merges = Merges(MERGING, model.layers, length, count, BLOCK, model.stored)
            tokens = prompt(length) + answer.tokens
            exact = model.run(tokens, length, {}, merges.edits)
            apart = model.run(tokens, length, {})
            return {
                "error": float((exact - answer.logprobs).abs().max()),
                "loss": float((exact - apart).abs().max()),
                "due": sorted(merges.edits),
                "stock": own.same(unmerged),
                "bytes": held * block_bytes(llm),
                "share": scale_share(llm.llm_engine.vllm_config),
                "leaked": before - free_blocks(llm),
                **watch.summary(),
            }


def main(runner: str, kind: str, model: str, output: str) -> None:
    """Run the cases of one kind on ``v1`` or ``v2``."""
    cases = Cases(Path(model), v2_harness.boot(v2=runner == "v2"))
    if kind in FORMATS:
        results = {"merging": cases.merging(kind)}
    elif kind == "triton":
        results = {"triton": cases.triton(SETTINGS)}
    elif kind == "uneven":
        results = {
            "tight": cases.tight(async_scheduling=False, settings=UNEVEN),
            "tight_async": cases.tight(async_scheduling=True, settings=UNEVEN),
        }
        if runner == "v2":  # which offers Triton
            results["triton"] = cases.triton(UNEVEN)
    else:
        results = {
            "ample": cases.ample(),
            "tight": cases.tight(async_scheduling=False),
            "tight_async": cases.tight(async_scheduling=True),
            "courses": cases.courses(async_scheduling=False),
            "courses_async": cases.courses(async_scheduling=True),
        }
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
