"""The scheduler, its workers and the block pool keep the design's invariants."""

import copy
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
pytest.importorskip("vllm")

import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import get_block_hash, get_group_id
from vllm.v1.kv_cache_interface import (
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request, RequestStatus

from tests.simulator import (
    BLOCK,
    STOP,
    VOCAB,
    Engine,
    Executor,
    Violation,
    answer,
    chain,
    require,
)
from vllm_kvcompress.budget import Fit, fit
from vllm_kvcompress.config import KEY, KVCompressionConfig
from vllm_kvcompress.engine.manager import CompressedKVManager
from vllm_kvcompress.engine.runner import RunnerV1, RunnerV2
from vllm_kvcompress.engine.scheduler import CompressedScheduler
from vllm_kvcompress.engine.spec import CompressedAttentionSpec
from vllm_kvcompress.plan import StepPlan

pytestmark = pytest.mark.vllm

MAX_LEN = 64
SLIDING_WINDOW = 7
PATIENCE = 300  # steps without a token or a finished request
RUNNERS = {"V1": RunnerV1, "V2": RunnerV2}


# Workloads ----------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes, what its prompt shares with others, what it wants."""

    step: int
    shared: int
    turn: int
    own: int
    max_tokens: int
    family: int = 0
    extra_args: dict[str, Any] | None = None
    priority: int = 0

    def prompt(self, number: int) -> list[int]:
        """A start that others have, its answer and a question: a conversation."""
        tokens = [1 + (7 * i + self.family) % 43 for i in range(self.shared)]
        for _ in range(self.turn if tokens else 0):
            tokens.append(answer(tokens))
        tokens += [1 + (11 * i + 5 * number) % 47 for i in range(self.own)]
        return tokens[: MAX_LEN - 1] or [1]


@dataclass(frozen=True)
class Workload:
    """An engine and what happens to it.

    Attributes:
        groups: A letter for each KV cache group: C compressed, W sliding window.
        disturbances: ``(step, what, which request)``.
    """

    method: dict[str, Any]
    arrivals: list[Arrival]
    disturbances: list[tuple[int, str, int]] = field(default_factory=list)
    groups: str = "C"
    runner: str = "V1"
    asynchronous: bool = False
    caching: bool = True
    policy: str = "fcfs"
    chunk: int = 64
    long_prefill: int = 0
    max_seqs: int = 6
    spare_blocks: int = 0
    reserve: bool = True


@cache
def base_config() -> VllmConfig:
    llama = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": VOCAB,
        "max_position_embeddings": MAX_LEN,
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(llama))
        return EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=MAX_LEN,
            enforce_eager=True,
            block_size=32,
        ).create_engine_config()


def build(load: Workload) -> Engine:
    """The engine of a workload, with a pool that vLLM would start with."""
    config = copy.copy(base_config())
    config.additional_config = {KEY: load.method}
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.cache_config = copy.copy(config.cache_config)
    scheduler = config.scheduler_config
    scheduler.async_scheduling = load.asynchronous
    scheduler.policy = load.policy
    scheduler.max_num_batched_tokens = load.chunk
    scheduler.max_num_scheduled_tokens = None
    scheduler.long_prefill_token_threshold = load.long_prefill
    scheduler.max_num_seqs = load.max_seqs
    scheduler.scheduler_reserve_full_isl = load.reserve
    common = dict(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    specs = {
        "C": CompressedAttentionSpec(**common),
        "W": SlidingWindowSpec(**common, sliding_window=SLIDING_WINDOW),
    }
    groups = [
        KVCacheGroupSpec([str(i)], specs[letter])
        for i, letter in enumerate(load.groups)
    ]
    needed = sum(
        group.kv_cache_spec.max_memory_usage_bytes(config)
        // group.kv_cache_spec.page_size_bytes
        for group in groups
    )
    blocks = 1 + needed + load.spare_blocks
    config.cache_config.enable_prefix_caching = load.caching
    config.cache_config.block_size = BLOCK
    config.cache_config.num_gpu_blocks = blocks
    kv_config = KVCacheConfig(blocks, kv_cache_tensors=[], kv_cache_groups=groups)
    return Engine(config, kv_config, RUNNERS[load.runner])


# Invariants -----------------------------------------------------------------------


class Run:
    """A workload under way."""

    def __init__(self, load: Workload) -> None:
        self.load = load
        self.engine = build(load)
        self.scheduler: Any = self.engine.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.config = KVCompressionConfig.from_dict(load.method)
        self.content: dict[bytes, list[int]] = {}
        self.requests: dict[str, Request] = {}
        self.targets: dict[str, Fit | None] = {}
        self.seen: Counter[str] = Counter()

    def add(self, number: int) -> None:
        """A request arrives."""
        arrival, request_id = self.load.arrivals[number], str(number)
        tokens = arrival.prompt(number)
        room = MAX_LEN - len(tokens)
        params = SamplingParams(
            max_tokens=min(arrival.max_tokens, room),
            stop_token_ids=[STOP],
            extra_args=arrival.extra_args,
        )
        request = Request(
            request_id,
            tokens,
            params,
            None,
            arrival_time=number,
            priority=arrival.priority,
            block_hasher=self.hash_blocks if self.load.caching else None,
        )
        wanted = arrival.extra_args or {}
        budget = self.config.prompt_budget(
            len(tokens), BLOCK, wanted.get(f"{KEY}_budget")
        )
        target = fit(len(tokens), budget, BLOCK)
        stays = params.max_tokens == 1 or wanted.get(KEY) == "off"
        self.targets[request_id] = None if stays or not target.shrinks else target
        self.requests[request_id] = request
        self.scheduler.add_request(request)

    def hash_blocks(self, request: Request) -> list[bytes]:
        """Hashes whose meaning is written down."""
        done, links = len(request.block_hashes), chain(list(request.all_token_ids))
        hashes = []
        for end in range((done + 1) * BLOCK, len(links) + 1, BLOCK):
            hashes.append(links[end - 1].to_bytes(8, "big", signed=True))
            self.content[hashes[-1]] = links[end - BLOCK : end]
        return hashes

    def disturb(self, what: str, number: int) -> None:
        """Something happens between two steps."""
        if what == "reset":
            self.scheduler.reset_prefix_cache(reset_running_requests=True)
        elif self.scheduler.requests:
            ids = sorted(self.scheduler.requests)
            request_id = ids[number % len(ids)]
            self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
            if what == "again" and not self.load.asynchronous:
                self.add(int(request_id))

    def run(self) -> None:
        """Go on until nothing is left."""
        step, waiting, last_progress = 0, list(range(len(self.load.arrivals))), (0, 0)
        while waiting or self.scheduler.has_requests() or self.engine.flying:
            while waiting and self.load.arrivals[waiting[0]].step <= step:
                self.add(waiting.pop(0))
            events = [e[1:] for e in self.load.disturbances if e[0] == step]
            for what, number in events:
                if what != "late abort":
                    self.disturb(what, number)
            if self.scheduler.has_requests():
                self.check(self.engine.schedule())
            for what, number in events:
                if what == "late abort":
                    self.disturb(what, number)
            if self.engine.flying:
                self.engine.update()
            step += 1
            tokens = sum(r.num_output_tokens for r in self.requests.values())
            progress = tokens - len(self.scheduler.requests) - len(waiting)
            if progress != last_progress[1]:
                last_progress = step, progress
            require(step < last_progress[0] + PATIENCE, "stuck")
        self.check_end()

    def check(self, out: Any) -> None:
        """Everything that has to hold after a step."""
        plan = getattr(out, "kv_compression", StepPlan())
        for request_id, count in out.num_scheduled_tokens.items():
            self.check_plan(self.requests[request_id], count, plan)
        for request in self.scheduler.running:
            self.check_request(request, plan)
        self.check_pool()
        self.seen["skipped"] += sum(plan.skipped.values())
        self.seen["pool_dry"] += plan.skipped.get("pool_dry", 0)
        for request_id, groups in plan.compress.items():
            self.seen["compressions"] += len(groups)
            self.seen["freed"] += sum(do.freed_blocks for do in groups.values())
            if self.requests[request_id].num_preemptions:
                self.seen["again"] += 1

    def check_plan(self, request: Request, count: int, plan: StepPlan) -> None:
        """A prompt is cut at its end, and compressed there or as soon as it can be."""
        request_id, prompt = request.request_id, request.num_prompt_tokens
        target, kept = self.targets[request_id], plan.compress.get(request_id, {})
        end = request.num_computed_tokens
        if target is None:
            require(not kept and request_id not in plan.observe, "unasked", request_id)
            return
        require(not end - count < prompt < end, "a chunk crosses the prompt's end")
        for do in kept.values():
            shape = (prompt, target.end_block, target.kept_blocks)
            require(
                (do.num_tokens, do.end_block, len(do.destination)) == shape, "shape", do
            )
        life = self.engine.worker.lives[request_id]
        missing = len(self.scheduler._managers) - len(life.kept)
        if end < prompt:
            require(not life.kept, "compressed too early")
        elif missing:
            require(plan.skipped.get("pool_dry", 0) >= missing, "never compressed")

    def check_request(self, request: Request, plan: StepPlan) -> None:
        """Invariants 1, 2, 5, 6 and 9: what a running request holds."""
        request_id, worker = request.request_id, self.engine.worker
        life, target = worker.lives[request_id], self.targets[request_id]
        now = plan.compress.get(request_id, {})
        for group, manager in enumerate(self.managers):
            blocks = manager.req_to_blocks[request_id]
            for i, block in enumerate(blocks):
                own = life.slots[group][i * BLOCK : (i + 1) * BLOCK]
                found = worker.memory[block.block_id][: len(own)]
                require(block.is_null or found == own, request_id, i, found, "not", own)
            if not isinstance(manager, CompressedKVManager):
                continue
            state, do = manager._compressed.get(request_id), life.kept.get(group)
            end, destination = (do.end_block, do.destination) if do else (0, ())
            private = state.destination if state else []
            require(
                [b.is_null for b in blocks] == [i < end for i in range(len(blocks))],
                "null entries of",
                request_id,
            )
            require(
                [b.block_id for b in private] == list(destination), "worker disagrees"
            )
            for block in private:
                require(block.ref_cnt == 1 and not block.block_hash, "not private")
            held = len(blocks) - end + len(private)
            formula = -(-request.num_computed_tokens // BLOCK)
            formula -= target.freed_blocks if target and do else 0
            require(held == formula, request_id, "holds", held, "blocks, not", formula)
            require(group in now or not (state and state.pending), "not given back")
            if not life.kept and self.load.caching:
                whole = min(request.num_prompt_tokens, life.computed) // BLOCK
                require(all(b.block_hash for b in blocks[:whole]), "not cached")

    def check_pool(self) -> None:
        """Invariants 3, 4 and 10: no block is lost, shared or mislabelled."""
        holders: Counter[int] = Counter()
        for manager in self.managers:
            for blocks in manager.req_to_blocks.values():
                holders.update(block.block_id for block in blocks)
            for state in getattr(manager, "_compressed", {}).values():
                holders.update(b.block_id for b in state.destination + state.pending)
        free = {b.block_id for b in self.pool.free_block_queue.get_all_free_blocks()}
        for block in self.pool.blocks[1:]:
            number = block.block_id
            require(block.ref_cnt == holders[number], number, "has a wrong ref count")
            require((number in free) == (not block.ref_cnt), number, "free, or not")
            if block.block_hash:
                group = get_group_id(block.block_hash)
                links = self.content[get_block_hash(block.block_hash)]
                found = self.engine.worker.memory[number]
                wanted = [(group, link) for link in links]
                require(found == wanted, number, "is cached, but holds", found)

    def check_end(self) -> None:
        """Invariant 10: nothing is left anywhere."""
        worker, scheduler = self.engine.worker, self.scheduler
        require(self.pool.get_num_free_blocks() == len(self.pool.blocks) - 1, "leak")
        executor = worker.compression
        left = [
            scheduler.requests,
            scheduler._budgets,
            scheduler._open,
            worker.lives,
            worker.rows,
            *(manager._compressed for manager in scheduler._managers.values()),
            *(executor.row_shift(group)._shift_of for group in scheduler._managers),
            *(window.queries for window in executor._windows),
        ]
        require(not any(left), "left over", left)
        totals = executor.totals
        require(totals.compressions == self.seen["compressions"], "compressions")
        require(totals.blocks_freed == self.seen["freed"], "freed blocks")
