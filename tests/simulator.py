"""vLLM's scheduler and ours, over workers whose memory knows what it holds.

Scheduler, managers, block pool, plan, our halves of the model runners, the executor
and its row shifts are the real ones. Model and KV cache are shadows: each slot of each
block remembers *which* KV it holds, so what a worker would read can be compared with
what the request needs. A broken invariant raises `Violation`.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, SlidingWindowSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_kvcompress.config import KEY, KVCompressionConfig
from vllm_kvcompress.engine import scheduler as schedulers
from vllm_kvcompress.engine.executor import CompressionExecutor
from vllm_kvcompress.engine.runner import RunnerV1, RunnerV2
from vllm_kvcompress.plan import Compress, StepPlan

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


def block_hasher(block_size: int, content: dict[bytes, list[int]]) -> Callable:
    """Hashes whose meaning is written down in ``content``."""

    def hash_blocks(request: Request) -> list[bytes]:
        done, links = len(request.block_hashes), chain(list(request.all_token_ids))
        hashes = []
        for end in range((done + 1) * block_size, len(links) + 1, block_size):
            hashes.append(links[end - 1].to_bytes(8, "big", signed=True))
            content[hashes[-1]] = links[end - block_size : end]
        return hashes

    return hash_blocks


@dataclass
class Life:
    """A request on the worker, from an admission until it is removed.

    ``slots[group][position]`` says what the KV of a token is: ``(group, link)`` if
    it is full attention's, ``(group, link, uid)`` if it saw a compressed context.
    """

    uid: int
    tokens: list[int]
    prompt: int
    groups: int
    computed: int = 0
    kept: dict[int, Compress] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.slots: list[list[Slot]] = [[] for _ in range(self.groups)]

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

    def private(self, group: int, block_size: int) -> list[Slot]:
        """What the private blocks have to hold, the i-th kept token as ``-i``."""
        blocks = self.kept[group].destination if group in self.kept else ()
        return [(group, -i, self.uid) for i in range(len(blocks) * block_size)]


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
        """Copy nothing in particular, but from and to the right places."""
        group, life = layer.group, self.worker.lives[request_id]
        if window := self._scorer.needs_queries:
            seen = layer.observation_window.take(request_id).tolist()
            wanted = [[life.uid, i] for i in range(life.prompt - window, life.prompt)]
            require(seen == wanted, "observed", seen, "instead of", wanted)
        self.worker.expect(row.tolist(), life.slots[group][: life.prompt], "source")
        life.kept[group] = do
        size = self.worker.block_size
        for i, block in enumerate(do.destination):
            kept = life.private(group, size)[i * size : (i + 1) * size]
            self.worker.memory[block] = kept


class Worker:
    """What is left of vLLM's runners; `RunnerV1` or `RunnerV2` goes on top."""

    def __init__(
        self, vllm_config: VllmConfig, kv_config: KVCacheConfig, is_held: Callable
    ) -> None:
        specs = [group.kv_cache_spec for group in kv_config.kv_cache_groups]
        rows = vllm_config.scheduler_config.max_num_seqs
        self.block_size = specs[0].block_size
        width = -(-vllm_config.model_config.max_model_len // self.block_size)
        self.is_held = is_held
        self.device = torch.device("cpu")
        self.windows = [getattr(spec, "sliding_window", None) for spec in specs]
        self.memory: list[list[Slot | None]] = [
            [None] * self.block_size for _ in range(kv_config.num_blocks)
        ]
        self.lives: dict[str, Life] = {}
        self.lives_begun = 0
        self.rows: dict[str, int] = {}
        self.free_rows = list(range(rows))
        self.tables = [BlockTable(rows, width) for _ in specs]
        self.layers = [SimpleNamespace(group=group) for group in range(len(specs))]
        config = KVCompressionConfig.from_dict(vllm_config.additional_config[KEY])
        self.compression = Executor(config, self.device)
        self.compression.worker = self
        self.compression.bind(kv_config, {str(x.group): x for x in self.layers}, rows)
        # Where our runners look.
        self.requests: dict[str, Any] = {}
        self.req_states = SimpleNamespace(req_id_to_index=self.rows)
        self.block_tables = SimpleNamespace(block_tables=self.tables)
        self.input_batch = SimpleNamespace(
            req_ids=[], req_id_to_index=self.rows, block_table=self.tables
        )

    def _begin(self, request_id: str, tokens: Any, prompt: int, hits: int) -> None:
        self.lives_begun += 1
        life = Life(self.lives_begun, list(tokens), prompt, len(self.tables))
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
        """V1: a resumed request's blocks replace its old ones."""
        cached = out.scheduled_cached_reqs
        for request_id in out.finished_req_ids:
            self.requests.pop(request_id, None)
            self.lives.pop(request_id, None)
        stay = out.num_scheduled_tokens.keys() - cached.resumed_req_ids
        for request_id in self.rows.keys() - (stay - out.finished_req_ids):
            self._leave_row(request_id)
        for new in out.scheduled_new_reqs:
            self.requests[new.req_id] = SimpleNamespace(block_ids=new.block_ids)
            self._begin(
                new.req_id, new.prompt_token_ids, new.prompt_len, new.num_computed_tokens
            )
        for i, request_id in enumerate(cached.req_ids):
            blocks, hits = cached.new_block_ids[i], cached.num_computed_tokens[i]
            if request_id in cached.resumed_req_ids:
                prompt = self.lives[request_id].prompt
                self.requests[request_id].block_ids = blocks
                self._begin(request_id, cached.all_token_ids[request_id], prompt, hits)
            else:
                for mine, ids in zip(
                    self.requests[request_id].block_ids, blocks or (), strict=False
                ):
                    mine.extend(ids)
                if request_id in self.rows:
                    self._append(request_id, blocks)
        for request_id in out.num_scheduled_tokens:
            if request_id not in self.rows:
                self._append(request_id, self.requests[request_id].block_ids, 0)
        self.input_batch.req_ids = sorted(self.rows, key=self.rows.__getitem__)

    def _prepare_inputs(self, out: SchedulerOutput, counts: np.ndarray) -> None:
        """V1."""

    def _remove_request(self, request_id: str) -> bool:
        """V2."""
        self._leave_row(request_id)
        return self.lives.pop(request_id, None) is not None

    def prepare_attn(self, input_batch: Any) -> None:
        """V2."""

    def execute_model(self: Any, out: SchedulerOutput) -> ModelRunnerOutput | None:
        raise NotImplementedError
