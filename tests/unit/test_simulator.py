"""The scheduler and its workers keep the design's invariants under any workload.

A `Run` is vLLM's engine core with our scheduler and the workers of tests/simulator.py.
After each step it checks what has to hold; hypothesis thinks of the workloads, and bugs
that are planted on purpose show that the checks find them.
"""

import copy
import json
import os
import tempfile
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
pytest.importorskip("vllm")

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import get_block_hash, get_group_id
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import (
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from tests.simulator import (
    BLOCK,
    STOP,
    VOCAB,
    Slot,
    Violation,
    Worker,
    answer,
    chain,
    require,
)
from vllm_kvcompress import methods
from vllm_kvcompress.budget import Fit, fit
from vllm_kvcompress.config import KEY, KVCompressionConfig
from vllm_kvcompress.engine.executor import CompressionExecutor
from vllm_kvcompress.engine.manager import CompressedKVManager
from vllm_kvcompress.engine.runner import RunnerV1, RunnerV2
from vllm_kvcompress.engine.scheduler import (
    CompressedAsyncScheduler,
    CompressedScheduler,
)
from vllm_kvcompress.engine.spec import CompressedAttentionSpec
from vllm_kvcompress.plan import Compress, StepPlan

pytestmark = pytest.mark.vllm

MAX_LEN = 64
SLIDING_WINDOW = 7
PATIENCE = 300  # steps without a new token or a finished request
RUNNERS = {"V1": RunnerV1, "V2": RunnerV2}


# Workloads ------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes, what it shares with others, and what it wants."""

    step: int
    shared: int
    turn: int
    own: int
    max_tokens: int
    extra_args: dict[str, Any] | None = None
    priority: int = 0

    def prompt(self, number: int) -> list[int]:
        """A start that others have, the model's answer to it, and a question."""
        tokens = [1 + 7 * i % 43 for i in range(self.shared)]
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


@st.composite
def workloads(draw: st.DrawFn, **fixed: Any) -> Workload:
    """Crowded little engines: prompts around the budget, pools just large enough."""
    kept = draw(st.integers(0, 6))
    least = BLOCK + max(kept, 1) - 1
    method: dict[str, Any] = {"method": "streamingllm", "sinks": kept}
    if kept and draw(st.booleans()):
        method = {"method": "snapkv", "window": kept}
    budget = least + draw(st.integers(0, 12))
    if draw(st.integers(0, 3)):
        method["budget"] = budget
    else:
        method["keep_ratio"] = draw(st.sampled_from([0.3, 0.6]))
    lengths = st.sampled_from([0, 8, 15, 16, 17, 24, 31, 40])
    starts = draw(st.lists(lengths, min_size=1, max_size=3))
    arrivals: list[Arrival] = []
    step = 0
    for _ in range(draw(st.integers(1, 10))):
        step += draw(st.sampled_from([0, 0, 0, 1, 4]))
        shared = draw(st.sampled_from(starts))
        edge = max(0, budget - shared)
        own = draw(
            st.sampled_from([0, 0, 1, 3])
            | st.integers(0, 20)
            | st.integers(max(0, edge - 1), edge + 1)
        )
        wish = draw(st.sampled_from([None, None, None, "off", "budget"]))
        extra_args = {KEY: "off"} if wish == "off" else None
        if wish == "budget":
            extra_args = {f"{KEY}_budget": draw(st.integers(least, budget))}
        arrivals.append(
            Arrival(
                step,
                shared,
                draw(st.sampled_from([0, 0, 3, 9])),
                own,
                draw(st.sampled_from([1, 2, 5, 9, 16, 30])),
                extra_args,
                draw(st.integers(0, 2)),
            )
        )
    kinds = st.sampled_from(["abort", "late abort", "reset", "again"])
    events = st.tuples(st.integers(0, 50), kinds, st.integers(0, 9))
    choices = {
        "groups": st.sampled_from(["C", "C", "CC", "CW"]),
        "runner": st.sampled_from(sorted(RUNNERS)),
        "asynchronous": st.booleans(),
        "caching": st.sampled_from([True, True, False]),
        "policy": st.sampled_from(["fcfs", "fcfs", "priority"]),
        "chunk": st.sampled_from([5, 8, 13, 24, 64]).map(lambda n: max(n, kept)),
        "long_prefill": st.sampled_from([0, 0, max(7, kept)]),
        "max_seqs": st.integers(1, 6),
        "spare_blocks": st.sampled_from([0, 0, 0, 2, 6, 20]),
        "reserve": st.booleans(),
    }
    rest = {name: draw(choice) for name, choice in choices.items() if name not in fixed}
    return Workload(
        method, arrivals, draw(st.lists(events, max_size=4)), **rest, **fixed
    )


@cache
def base_config() -> VllmConfig:
    """vLLM's configuration for a model that is never built."""
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
        ).create_engine_config()


def configs(load: Workload) -> tuple[VllmConfig, KVCacheConfig]:
    """A workload's engine, with at least the blocks that vLLM insists on."""
    config = copy.copy(base_config())
    config.additional_config = {KEY: load.method}
    scheduler = config.scheduler_config = copy.copy(config.scheduler_config)
    scheduler.async_scheduling = load.asynchronous
    scheduler.policy = load.policy
    scheduler.max_num_batched_tokens = load.chunk
    scheduler.max_num_scheduled_tokens = None
    scheduler.long_prefill_token_threshold = load.long_prefill
    scheduler.max_num_seqs = load.max_seqs
    scheduler.scheduler_reserve_full_isl = load.reserve
    common = dict(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    kinds = {
        "C": CompressedAttentionSpec(**common),
        "W": SlidingWindowSpec(**common, sliding_window=SLIDING_WINDOW),
    }
    specs = [kinds[letter] for letter in load.groups]
    blocks = 1 + load.spare_blocks
    for spec in specs:
        blocks += spec.max_memory_usage_bytes(config) // spec.page_size_bytes
    cache_config = config.cache_config = copy.copy(config.cache_config)
    cache_config.enable_prefix_caching = load.caching
    cache_config.block_size = BLOCK
    cache_config.num_gpu_blocks = blocks
    groups = [KVCacheGroupSpec([str(i)], spec) for i, spec in enumerate(specs)]
    return config, KVCacheConfig(blocks, kv_cache_tensors=[], kv_cache_groups=groups)


# The engine and its invariants ------------------------------------------------------


class Run:
    """A workload under way."""

    def __init__(self, load: Workload) -> None:
        self.load = load
        config, kv_config = configs(load)
        cls = CompressedAsyncScheduler if load.asynchronous else CompressedScheduler
        self.scheduler: Any = cls(
            vllm_config=config,
            kv_cache_config=kv_config,
            structured_output_manager=Mock(),
            block_size=BLOCK,
        )
        self.scheduler.use_v2_model_runner = load.runner == "V2"
        kv_cache_manager = self.scheduler.kv_cache_manager
        self.pool = kv_cache_manager.block_pool
        self.managers = kv_cache_manager.coordinator.single_type_managers
        runner = type("Compressed", (RUNNERS[load.runner], Worker), {})
        self.worker: Any = runner(config, kv_config, self.pool)
        self.queue: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.config = KVCompressionConfig.from_dict(load.method)
        self.requests: dict[str, Request] = {}
        # What is to become of each prompt, None: nothing.
        self.targets: dict[str, Fit | None] = {}
        self.content: dict[bytes, list[int]] = {}
        self.seen: Counter[str] = Counter()

    def run(self) -> None:
        """Go on until nothing is left."""
        step, waiting = 0, list(range(len(self.load.arrivals)))
        patience, state = PATIENCE, None
        while waiting or self.scheduler.has_requests() or self.queue:
            while waiting and self.load.arrivals[waiting[0]].step <= step:
                self.add(waiting.pop(0))
            events = [event[1:] for event in self.load.disturbances if event[0] == step]
            for what, number in events:
                if what != "late abort":
                    self.disturb(what, number)
            if self.scheduler.has_requests():
                self.check(self.schedule())
            for what, number in events:
                if what == "late abort":
                    self.disturb(what, number)
            depth = 2 if self.load.asynchronous else 1
            if len(self.queue) == depth or not self.scheduler.has_requests():
                self.deliver()
            step += 1
            tokens = sum(r.num_output_tokens for r in self.requests.values())
            before, state = state, (tokens, len(waiting), len(self.scheduler.requests))
            patience = PATIENCE if state != before else patience - 1
            require(patience > 0, "stuck")
        self.check_end()

    def add(self, number: int) -> None:
        """A request arrives."""
        arrival, request_id = self.load.arrivals[number], str(number)
        tokens, wish = arrival.prompt(number), arrival.extra_args or {}
        params = SamplingParams(
            max_tokens=min(arrival.max_tokens, MAX_LEN - len(tokens)),
            stop_token_ids=[STOP],
            extra_args=arrival.extra_args,
        )
        self.requests[request_id] = Request(
            request_id,
            tokens,
            params,
            None,
            arrival_time=number,
            priority=arrival.priority,
            block_hasher=self.hash_blocks if self.load.caching else None,
        )
        asked = wish.get(f"{KEY}_budget")
        budget = self.config.prompt_budget(len(tokens), BLOCK, asked)
        target = fit(len(tokens), budget, BLOCK)
        stays = params.max_tokens == 1 or wish.get(KEY) == "off" or not target.shrinks
        self.targets[request_id] = None if stays else target
        self.scheduler.add_request(self.requests[request_id])

    def hash_blocks(self, request: Request) -> list[bytes]:
        """Hash new whole blocks, and write down what each hash stands for."""
        links, hashes = chain(list(request.all_token_ids)), []
        first = (len(request.block_hashes) + 1) * BLOCK
        for end in range(first, len(links) + 1, BLOCK):
            hashes.append(links[end - 1].to_bytes(8, "big", signed=True))
            self.content[hashes[-1]] = links[end - BLOCK : end]
        return hashes

    def disturb(self, what: str, number: int) -> None:
        """Something happens between two steps."""
        if what == "reset":
            self.scheduler.reset_prefix_cache(reset_running_requests=True)
        elif ids := sorted(self.scheduler.requests):
            request_id = ids[number % len(ids)]
            self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
            # vLLM itself mixes up two requests of one id while a step is in flight.
            if what == "again" and not self.load.asynchronous:
                self.add(int(request_id))

    def schedule(self) -> SchedulerOutput:
        """Schedule a step and have it run; workers obey in the same order."""
        hashes = [block.block_hash for block in self.pool.blocks]
        out = self.scheduler.schedule()
        if self.load.policy == "priority" and out.preempted_req_ids:
            # vLLM hashes blocks before they are computed, and forgets to undo that
            # if it then preempts their request in the same step (stock 0.32, too).
            new = {
                block.block_id
                for block, before in zip(self.pool.blocks, hashes, strict=True)
                if not block.ref_cnt and block.block_hash != before
            }
            self.pool.evict_blocks(new)
        result = self.worker.execute_model(out) or self.worker.sample_tokens()
        self.queue.append((out, result))
        return out

    def deliver(self) -> None:
        """The oldest step's tokens reach the scheduler."""
        if self.queue:
            self.scheduler.update_from_output(*self.queue.popleft())

    def check(self, out: SchedulerOutput) -> None:
        """All that has to hold after a step."""
        plan = getattr(out, "kv_compression", StepPlan())
        for request_id, count in out.num_scheduled_tokens.items():
            self.check_plan(self.requests[request_id], count, plan)
        for request in self.scheduler.running:
            self.check_request(request, plan)
        self.check_pool()
        self.seen["hits"] += sum(
            new.num_computed_tokens > 0 for new in out.scheduled_new_reqs
        )
        self.seen["pool dry"] += plan.skipped.get("pool_dry", 0)
        for request_id, groups in plan.compress.items():
            self.seen["compressions"] += len(groups)
            self.seen["freed"] += sum(do.freed_blocks for do in groups.values())
            self.seen["again"] += self.requests[request_id].num_preemptions > 0

    def check_plan(self, request: Request, count: int, plan: StepPlan) -> None:
        """A prompt is cut at its end, and compressed there or as soon as possible.

        So it is when its request comes back after a preemption: all that follows the
        prompt then sees it compressed, as it did before.
        """
        request_id, prompt = request.request_id, request.num_prompt_tokens
        target, now = self.targets[request_id], plan.compress.get(request_id, {})
        if target is None:
            unasked = request_id in plan.observe or now
            require(not unasked, request_id, "has to stay as it is")
            return
        end = request.num_computed_tokens
        require(not end - count < prompt < end, "a chunk crosses the prompt's end")
        for do in now.values():
            require(do.num_tokens == prompt and do.end_block == target.end_block, do)
            require(len(do.destination) == target.kept_blocks, do, target)
        kept = self.worker.lives[request_id].kept
        missing = self.load.groups.count("C") - len(kept)
        if end < prompt:
            require(not kept, request_id, "is compressed too early")
        elif missing:
            require(request_id in self.scheduler._dry, request_id, "is forgotten")
            retried = self.scheduler._open.get(request_id, ())
            require(len(retried) == missing, request_id, "is not tried again")

    def check_request(self, request: Request, plan: StepPlan) -> None:
        """What a running request holds, in each group."""
        request_id = request.request_id
        life = self.worker.lives[request_id]
        for group, manager in enumerate(self.managers):
            blocks = manager.req_to_blocks[request_id]
            self.check_entries(blocks, life.slots[group])
            if not isinstance(manager, CompressedKVManager):
                continue
            do = life.kept.get(group, Compress(0, 0, ()))
            state = manager._compressed.get(request_id)
            self.check_private(do, state.destination if state else [])
            nulls = [block.is_null for block in blocks]
            wanted = [entry < do.end_block for entry in range(len(blocks))]
            require(nulls == wanted, request_id, "null entries", nulls)
            # Invariant 5: as many blocks as budget.py says.
            held = nulls.count(False) + len(do.destination)
            target = self.targets[request_id]
            formula = -(-request.num_computed_tokens // BLOCK)
            formula -= target.freed_blocks if target and do.num_tokens else 0
            require(held == formula, request_id, "holds", held, "and not", formula)
            given_back = group in plan.compress.get(request_id, {}) or not (
                state and state.pending
            )
            require(given_back, request_id, "keeps originals")
            # Invariant 9: a prompt that is not compressed can be hit as ever.
            if not life.kept and self.load.caching:
                whole = min(life.prompt, life.computed) // BLOCK
                hashed = all(block.block_hash for block in blocks[:whole])
                require(hashed, request_id, "is not cached")

    def check_entries(self, blocks: list[Any], slots: list[Slot]) -> None:
        """Invariant 1: a logical entry holds exactly its own tokens, or is null."""
        for entry, block in enumerate(blocks):
            own = slots[entry * BLOCK : (entry + 1) * BLOCK]
            found = self.worker.memory[block.block_id][: len(own)]
            require(block.is_null or found == own, "entry", entry, found, "not", own)

    def check_private(self, do: Compress, destination: list[Any]) -> None:
        """Invariants 2, 6: blocks as the worker knows them, unhashed, in one request.

        A block with one reference is in one request, see `check_pool`.
        """
        ids = tuple(block.block_id for block in destination)
        require(ids == do.destination, "the worker keeps", do.destination, "not", ids)
        for block in destination:
            require(not block.block_hash, block.block_id, "is private and hashed")
            require(block.ref_cnt == 1, block.block_id, "is not private")

    def check_pool(self) -> None:
        """Invariants 3, 4, 10: no block is lost, free and held, or wrongly hashed."""
        holders: Counter[int] = Counter()
        for manager in self.managers:
            for blocks in manager.req_to_blocks.values():
                holders.update(block.block_id for block in blocks)
            for state in getattr(manager, "_compressed", {}).values():
                for block in state.destination + state.pending:
                    holders[block.block_id] += 1
        free = {b.block_id for b in self.pool.free_block_queue.get_all_free_blocks()}
        for block in self.pool.blocks[1:]:
            number = block.block_id
            require(block.ref_cnt == holders[number], number, "has a wrong ref_cnt")
            require((number in free) == (not block.ref_cnt), number, "free, or held")
            if block.block_hash:
                group = get_group_id(block.block_hash)
                links = self.content[get_block_hash(block.block_hash)]
                found = self.worker.memory[number]
                exact = [(group, link) for link in links]
                require(found == exact, "hashed block", number, "holds", found)

    def check_end(self) -> None:
        """Invariant 10: nothing is left, and the counters meet."""
        scheduler, executor = self.scheduler, self.worker.compression
        require(self.pool.get_num_free_blocks() == len(self.pool.blocks) - 1, "leak")
        left = [
            scheduler.requests,
            scheduler._budgets,
            scheduler._open,
            scheduler._dry,
            scheduler._exact_tokens,
            self.worker.lives,
            *(manager._compressed for manager in scheduler._managers.values()),
            *(executor.row_shift(group)._shift_of for group in scheduler._managers),
            *(window.queries for window in executor._windows),
        ]
        require(not any(left), "something is left", left)
        totals = executor.totals
        require(
            totals.compressions == self.seen["compressions"], "compressions", totals
        )
        require(totals.blocks_freed == self.seen["freed"], "freed blocks", totals)


# Tests ------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _find_methods_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of engines would spend half of their time on it."""
    monkeypatch.setattr(methods, "entry_points", cache(methods.entry_points))


def explore(
    examples: int,
    number: int | None = 0,
    phases: tuple[Phase, ...] = tuple(Phase),
    **fixed: Any,
) -> Counter[str]:
    """Run workloads, and return how much of what happened in them.

    Args:
        examples: How many.
        number: Seed, None = other ones each time.
        phases: Of hypothesis.
        fixed: Fields that all workloads have in common.
    """
    seen: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(workloads(**fixed))
    def check(load: Workload) -> None:
        run = Run(load)
        run.run()
        seen.update(run.seen)

    (check if number is None else seed(number)(check))()
    return seen


@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("runner", RUNNERS)
def test_invariants(runner: str, number: int) -> None:
    seen = explore(200, number, runner=runner)
    assert min(seen[what] for what in ("compressions", "again", "hits", "pool dry")) > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("runner", RUNNERS)
def test_invariants_at_length(runner: str) -> None:
    explore(8000, None, runner=runner)


Planted = Callable[[Callable[..., Any]], Callable[..., Any]]


def _compact_in_place(_: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, source, count: source[:count]


def _keep_stolen_hashes(_: Callable[..., Any]) -> Callable[..., Any]:
    def private_blocks(self: Any, source: list[Any], count: int) -> list[Any] | None:
        own = [block for block in source if block.ref_cnt == 1]
        fresh = min(count, self.block_pool.get_num_free_blocks())
        if count - fresh > len(own):
            return None
        return own[: count - fresh] + self.block_pool.get_new_blocks(fresh)

    return private_blocks


def _free_at_planning(compress: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, *args: Any) -> Any:
        directive = compress(self, *args)
        self.block_pool.free_blocks(self.take_pending())
        return directive

    return planted


def _lose_private_blocks(_: Callable[..., Any]) -> Callable[..., Any]:
    def pop_blocks_for_free(self: Any, request_id: str) -> list[Any]:
        self._compressed.pop(request_id, None)
        return FullAttentionManager.pop_blocks_for_free(self, request_id)

    return pop_blocks_for_free


def _hash_approximate(compress: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, request: Request) -> Any:
        planned = compress(self, request)
        self._exact_tokens.clear()
        return planned

    return planted


def _hash_what_a_late_group_sees(compress: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, request: Request) -> Any:
        if planned := compress(self, request):
            self._exact_tokens[request.request_id] = request.num_computed_tokens
        return planned

    return planted


def _hash_in_sliding_groups(guard: Callable[..., Any]) -> Callable[..., Any]:
    def uncapped(cache_blocks: Callable[..., Any]) -> Callable[..., Any]:
        return lambda request, _, *args, **kwargs: cache_blocks(
            request, min(request.num_tokens, request.num_computed_tokens), **kwargs
        )

    def planted(self: Any) -> None:
        guard(self)
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if not isinstance(manager, CompressedKVManager):
                manager.cache_blocks = uncapped(manager.cache_blocks)

    return planted


def _do_not_cut_again(reserve: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, request: Request, *args: Any) -> int:
        if request.num_preemptions:
            return Scheduler._reserve_prefill_lookahead(self, request, *args)
        return reserve(self, request, *args)

    return planted


def _do_not_retry(compress: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, request: Request) -> Any:
        planned = compress(self, request)
        self._open.pop(request.request_id, None)
        return planned

    return planted


def _keep_preempted_rows(_: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, out: SchedulerOutput) -> None:
        for request_id in out.finished_req_ids:
            self.compression.forget(request_id)
        Worker._update_states(self, out)

    return planted


def _keep_rows(_: Callable[..., Any]) -> Callable[..., Any]:
    def forget(self: Any, request_id: str) -> None:
        for window in self._windows:
            window.queries.pop(request_id, None)

    return forget


MANAGER, SCHEDULER = CompressedKVManager, CompressedScheduler
# What goes wrong -> where it is planted, and where to look first.
PLANTED: dict[str, tuple[type, str, Planted, dict[str, Any]]] = {
    "compaction in place": (MANAGER, "_private_blocks", _compact_in_place, {}),
    "stolen hash kept": (MANAGER, "_private_blocks", _keep_stolen_hashes, {}),
    "freed at planning": (MANAGER, "compress", _free_at_planning, {}),
    "never freed": (MANAGER, "take_pending", lambda _: lambda self: [], {}),
    "private lost": (MANAGER, "pop_blocks_for_free", _lose_private_blocks, {}),
    "approximate KV hashed": (SCHEDULER, "_compress", _hash_approximate, {}),
    "hashed by a late group": (
        SCHEDULER,
        "_compress",
        _hash_what_a_late_group_sees,
        {"groups": "CC", "caching": True, "spare_blocks": 0},
    ),
    "hashed in sliding groups": (
        SCHEDULER,
        "_guard_prefix_cache",
        _hash_in_sliding_groups,
        {"groups": "CW"},
    ),
    "window starved by a hit": (
        SCHEDULER,
        "_get_local_prefix_cache_hit",
        lambda _: Scheduler._get_local_prefix_cache_hit,
        {},
    ),
    "resumed prompt not cut": (
        SCHEDULER,
        "_reserve_prefill_lookahead",
        _do_not_cut_again,
        {},
    ),
    "no retry": (
        SCHEDULER,
        "_compress",
        _do_not_retry,
        {"caching": True, "spare_blocks": 0},
    ),
    "V1 keeps a preempted row": (
        RunnerV1,
        "_update_states",
        _keep_preempted_rows,
        {"runner": "V1"},
    ),
    "V2 keeps rows": (CompressionExecutor, "forget", _keep_rows, {"runner": "V2"}),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_simulator_finds_planted_bugs(
    bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, plant, hints = PLANTED[bug]
    monkeypatch.setattr(owner, name, plant(getattr(owner, name)))
    with pytest.raises(Violation):
        explore(600, phases=(Phase.generate,), **hints)
