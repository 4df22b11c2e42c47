"""vLLM's scheduler and ours, over workers whose memory knows what it holds.

Scheduler, managers, block pool, plan, our halves of the model runners, the executor
and its row shifts are the real ones. Model and KV cache are shadows: each slot of each
block remembers *which* KV it holds, so what a worker would read can be compared with
what the request needs. A broken invariant raises `Violation`.
"""

from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from vllm_kvcompress.config import KEY, KVCompressionConfig
from vllm_kvcompress.engine.executor import CompressionExecutor
from vllm_kvcompress.engine.runner import RunnerV1, RunnerV2
from vllm_kvcompress.engine.scheduler import (
    CompressedAsyncScheduler,
    CompressedScheduler,
)
from vllm_kvcompress.plan import Compress

BLOCK = 4
STOP, VOCAB = 0, 50
Slot = tuple[int, ...]


class Violation(AssertionError):
    """An invariant is broken."""


def require(holds: bool, *what: object) -> None:
    """Raise unless an invariant holds."""
    if not holds:
        raise Violation(" ".join(map(str, what)))


def chain(tokens: list[int]) -> list[int]:
    """Content identity: a token's KV depends on the token and all before it."""
    links = [0]
    for token in tokens:
        links.append(hash((links[-1], token)))
    return links[1:]


def answer(tokens: list[int]) -> int:
    """The model's next token; now and then it stops by surprise."""
    link = chain(tokens)[-1]
    return STOP if link % 16 == 0 else 1 + link % (VOCAB - 1)


@dataclass
class Life:
    """A request on the worker, from an admission until it is removed.

    ``slots[group][position]`` says what the KV of a token is: ``(group, link)`` if
    it is full attention's, ``(group, link, uid)`` if it saw a compressed context.
    """

    uid: int
    tokens: list[int]
    prompt: int
    slots: list[list[Slot]]
    computed: int = 0
    kept: dict[int, Compress] = field(default_factory=dict)

    def compute(self, count: int) -> range:
        """Go on by ``count`` tokens, and return their positions."""
        new = range(self.computed, self.computed + count)
        require(new.stop <= len(self.tokens), "a token is scheduled that is unknown")
        mark = (self.uid,) if self.kept else ()
        links = chain(self.tokens)[new.start : new.stop]
        for group, slots in enumerate(self.slots):
            slots += [(group, link, *mark) for link in links]
        self.computed = new.stop
        return new

    def private(self, group: int) -> list[Slot]:
        """What the private blocks have to hold, the i-th kept token as ``-i``."""
        blocks = self.kept[group].destination if group in self.kept else ()
        return [(group, -i, self.uid) for i in range(len(blocks) * BLOCK)]


class BlockTable:
    """One group's rows. V2 stages writes, and makes them in no particular order."""

    def __init__(self, rows: int, width: int) -> None:
        self.gpu = torch.zeros(rows, width, dtype=torch.int32)
        self.filled = [0] * rows
        self.staged: dict[tuple[int, int], int] = {}

    def get_numpy_array(self) -> np.ndarray:
        return self.gpu.numpy()

    def stage_write(self, row: int, start: int, blocks: list[int]) -> None:
        for entry, block in enumerate(blocks, start):
            require((row, entry) not in self.staged, "two staged writes race")
            self.staged[row, entry] = block

    def apply(self) -> None:
        for place, block in self.staged.items():
            self.gpu[place] = block
        self.staged.clear()


class Executor(CompressionExecutor):
    """Ours, with the shadow memory in place of tensors."""

    worker: "Worker"

    def _compress(
        self, layer: Any, request_id: str, row: torch.Tensor, do: Compress, *_: Any
    ) -> None:
        """Copy no numbers, but from and to the right places."""
        worker, group = self.worker, layer.group
        life = worker.lives[request_id]
        if window := self._scorer.needs_queries:
            seen = layer.observation_window.take(request_id).tolist()
            wanted = [[life.uid, i] for i in range(life.prompt - window, life.prompt)]
            require(seen == wanted, "observed", seen, "instead of", wanted)
        worker.expect(row.tolist(), life.slots[group][: life.prompt], "source")
        life.kept[group] = do
        for i, block in enumerate(do.destination):
            worker.memory[block] = life.private(group)[i * BLOCK : (i + 1) * BLOCK]


class Worker:
    """What is left of vLLM's runners; `RunnerV1` or `RunnerV2` goes on top."""

    def __init__(
        self, vllm_config: VllmConfig, kv_config: KVCacheConfig, pool: BlockPool
    ) -> None:
        groups = kv_config.kv_cache_groups
        num_rows = vllm_config.scheduler_config.max_num_seqs
        width = -(-vllm_config.model_config.max_model_len // BLOCK)
        self.device, self.pool = torch.device("cpu"), pool
        self.attention_spans = [
            getattr(group.kv_cache_spec, "sliding_window", None) for group in groups
        ]
        self.memory: list[list[Slot | None]] = [
            [None] * BLOCK for _ in range(kv_config.num_blocks)
        ]
        self.lives: dict[str, Life] = {}
        self.lives_begun = 0
        self.rows: dict[str, int] = {}
        self.free_rows = list(range(num_rows))
        self.tables = [BlockTable(num_rows, width) for _ in groups]
        self.layers = [SimpleNamespace(group=group) for group in range(len(groups))]
        config = KVCompressionConfig.from_dict(vllm_config.additional_config[KEY])
        self.compression = Executor(config, self.device)
        self.compression.worker = self
        layers = {str(layer.group): layer for layer in self.layers}
        self.compression.bind(kv_config, layers, num_rows)
        # Where our runners look.
        self.requests: dict[str, Any] = {}
        self.req_states = SimpleNamespace(req_id_to_index=self.rows)
        self.block_tables = SimpleNamespace(block_tables=self.tables)
        self.input_batch = SimpleNamespace(
            req_ids=[], req_id_to_index=self.rows, block_table=self.tables
        )

    # State, as vLLM's runners keep it ----------------------------------------

    def _begin(self, request_id: str, tokens: Any, prompt: int, hits: int) -> None:
        self.lives_begun += 1
        slots: list[list[Slot]] = [[] for _ in self.tables]
        life = Life(self.lives_begun, list(tokens), prompt, slots)
        life.compute(hits)
        self.lives[request_id] = life

    def _append(self, request_id: str, blocks: Any, start: int | None = None) -> None:
        if request_id not in self.rows:
            self.rows[request_id] = self.free_rows.pop()
        row = self.rows[request_id]
        for table, ids in zip(self.tables, blocks or (), strict=False):
            first = table.filled[row] if start is None else start
            table.filled[row] = first + len(ids)
            table.stage_write(row, first, ids)

    def _leave_row(self, request_id: str) -> None:
        if request_id in self.rows:
            self.free_rows.append(self.rows.pop(request_id))

    def _update_states(self, out: SchedulerOutput) -> None:
        """V1: who is not scheduled leaves the batch, and is written anew later."""
        cached = out.scheduled_cached_reqs
        for request_id in out.finished_req_ids:
            self.requests.pop(request_id, None)
            self.lives.pop(request_id, None)
        stay = out.num_scheduled_tokens.keys() - cached.resumed_req_ids
        for request_id in self.rows.keys() - (stay - out.finished_req_ids):
            self._leave_row(request_id)
        for new in out.scheduled_new_reqs:
            self.requests[new.req_id] = SimpleNamespace(block_ids=new.block_ids)
            tokens, hits = new.prompt_token_ids, new.num_computed_tokens
            self._begin(new.req_id, tokens, new.prompt_len, hits)
        for i, request_id in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[i]
            if request_id in cached.resumed_req_ids:
                self.requests[request_id].block_ids = blocks
                self._begin(
                    request_id,
                    cached.all_token_ids[request_id],
                    self.lives[request_id].prompt,
                    cached.num_computed_tokens[i],
                )
                continue
            state = self.requests[request_id]
            for mine, ids in zip(state.block_ids, blocks or (), strict=False):
                mine.extend(ids)
            if request_id in self.rows:
                self._append(request_id, blocks)
        for request_id in out.num_scheduled_tokens.keys() - self.rows.keys():
            self._append(request_id, self.requests[request_id].block_ids, 0)
        self.input_batch.req_ids = sorted(self.rows, key=lambda r: self.rows[r])

    def _remove_request(self, request_id: str) -> bool:
        """V2."""
        self._leave_row(request_id)
        return self.lives.pop(request_id, None) is not None

    def _update_requests(self, out: SchedulerOutput) -> None:
        """V2: preempted requests are removed, and come back as new ones."""
        for request_id in sorted(
            out.finished_req_ids | (out.preempted_req_ids or set())
        ):
            self._remove_request(request_id)
        for new in out.scheduled_new_reqs:
            self._remove_request(new.req_id)
            tokens, hits = new.prefill_token_ids, new.num_computed_tokens
            self._begin(new.req_id, tokens, new.prompt_len, hits)
            self._append(new.req_id, new.block_ids, 0)
        cached = out.scheduled_cached_reqs
        for request_id, blocks in zip(
            cached.req_ids, cached.new_block_ids, strict=True
        ):
            self._append(request_id, blocks)
        self.input_batch.req_ids = list(out.num_scheduled_tokens)

    def _prepare_inputs(self, out: SchedulerOutput, counts: np.ndarray) -> None:
        """V1: ours goes first."""

    def prepare_attn(self, input_batch: Any) -> None:
        """V2: ours goes first."""

    # A step -------------------------------------------------------------------

    def execute_model(self: Any, out: SchedulerOutput) -> ModelRunnerOutput | None:
        """Write the batch's tokens, show its queries, and read as attention does."""
        v1 = isinstance(self, RunnerV1)
        self._update_states(out) if v1 else self._update_requests(out)
        for table in self.tables:
            table.apply()
        batch = self.input_batch.req_ids
        if not batch:
            return EMPTY_MODEL_RUNNER_OUTPUT
        counts = np.array([out.num_scheduled_tokens[r] for r in batch])
        if v1:
            self._prepare_inputs(out, counts)
        else:
            step = SimpleNamespace(req_ids=batch, num_scheduled_tokens=counts)
            self.prepare_attn(step)
        queries = []
        for request_id, count in zip(batch, counts.tolist(), strict=True):
            life, row = self.lives[request_id], self.rows[request_id]
            for position in life.compute(count):
                queries.append((life.uid, position))
                for table, slots in zip(self.tables, life.slots, strict=True):
                    block = int(table.gpu[row, position // BLOCK])
                    require(block > 0, "a token is written to the null block")
                    self.memory[block][position % BLOCK] = slots[position]
        for layer in self.layers:
            if window := getattr(layer, "observation_window", None):
                window.capture(torch.tensor(queries))
        for request_id, count in zip(batch, counts.tolist(), strict=True):
            for group in range(len(self.tables)):
                self._attend(request_id, group, count)
        return None

    def _attend(self, request_id: str, group: int, count: int) -> None:
        """Read a row as kernels do: shifted left, and shorter."""
        life, shift = self.lives[request_id], self.compression.row_shift(group)
        shifted = shift.get(request_id) if shift else 0
        replaced = life.kept[group].end_block if group in life.kept else 0
        wanted = life.private(group) + life.slots[group][replaced * BLOCK :]
        length = life.computed - shifted
        require(length == len(wanted), "length", length, "not", len(wanted))
        span = self.attention_spans[group] or length
        first = max(0, length - count - span + 1) // BLOCK
        row = self.tables[group].gpu[self.rows[request_id]].tolist()
        blocks = row[shifted // BLOCK :][first : -(-length // BLOCK)]
        self.expect(blocks, wanted[first * BLOCK :], f"{request_id} group {group}")

    def expect(self, blocks: list[int], wanted: list[Slot], what: str) -> None:
        """What a worker reads is still held, and is what it needs."""
        for block in blocks:
            require(self.pool.blocks[block].ref_cnt > 0, what, "read", block, "is free")
        found = [slot for block in blocks for slot in self.memory[block]]
        require(found[: len(wanted)] == wanted, what, found, "instead of", wanted)

    def sample_tokens(self) -> ModelRunnerOutput:
        batch = list(self.input_batch.req_ids)
        sampled = []
        for life in (self.lives[request_id] for request_id in batch):
            whole = life.computed == len(life.tokens)
            sampled.append([answer(life.tokens)] if whole else [])
            life.tokens += sampled[-1]
        return ModelRunnerOutput(batch, {r: i for i, r in enumerate(batch)}, sampled)


class Engine:
    """vLLM's engine core: one step at a time, or two in flight."""

    def __init__(
        self, vllm_config: VllmConfig, kv_config: KVCacheConfig, runner: type
    ) -> None:
        depth = 2 if vllm_config.scheduler_config.async_scheduling else 1
        cls = (CompressedScheduler, CompressedAsyncScheduler)[depth - 1]
        self.scheduler = cls(
            vllm_config=vllm_config,
            kv_cache_config=kv_config,
            structured_output_manager=Mock(),
            block_size=BLOCK,
        )
        self.scheduler.use_v2_model_runner = runner is RunnerV2
        pool = self.scheduler.kv_cache_manager.block_pool
        self.worker = type("Runner", (runner, Worker), {})(vllm_config, kv_config, pool)
        self.depth = depth
        self.flying: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()

    def schedule(self) -> SchedulerOutput:
        """Plan and run a step; a worker is never more than a queue behind."""
        out = self.scheduler.schedule()
        result = self.worker.execute_model(out) or self.worker.sample_tokens()
        self.flying.append((out, result))
        return out

    def update(self) -> None:
        """Deliver the oldest step, if nothing else is to be done before."""
        if len(self.flying) == self.depth or not self.scheduler.has_requests():
            self.scheduler.update_from_output(*self.flying.popleft())
