"""vLLM's engine core with our scheduler, checked after each step.

A `Run` takes a workload through it. The workers are those of tests/simulator.py, and
what has to become of each request is worked out by `Course`.
"""

from collections import Counter, deque
from typing import Any
from unittest.mock import Mock

from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import get_block_hash, get_group_id
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from tests.simulator import BLOCK, STOP, Slot, Worker, chain, require
from tests.unit.course import Course, Target
from tests.unit.engines import configs
from tests.unit.workloads import MAX_LEN, RUNNERS, Workload
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.engine.manager import CompressedKVManager
from vllm_kvcompress.engine.scheduler import (
    CompressedAsyncScheduler,
    CompressedScheduler,
)
from vllm_kvcompress.plan import Compress, StepPlan

PATIENCE = 300  # steps without a new token or a finished request


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
        self.find_hit = self.scheduler._get_local_prefix_cache_hit
        self.scheduler._get_local_prefix_cache_hit = self.check_hit
        kv_cache_manager = self.scheduler.kv_cache_manager
        self.pool = kv_cache_manager.block_pool
        self.managers = kv_cache_manager.coordinator.single_type_managers
        runner = type("Compressed", (RUNNERS[load.runner], Worker), {})
        self.worker: Any = runner(config, kv_config, self.pool)
        self.queue: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.config = KVCompressionConfig.from_dict(load.settings)
        self.tiers = load.tiers()
        self.requests: dict[str, Request] = {}
        # Request id -> the request and its preemptions so far, its course since then.
        self.courses: dict[str, tuple[tuple[Request, int], Course]] = {}
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
        tokens = arrival.prompt(number)
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

    # Checks --------------------------------------------------------------------

    def check(self, out: SchedulerOutput) -> None:
        """All that has to hold after a step."""
        plan = getattr(out, "kv_compression", StepPlan())
        dry = 0
        for request_id, count in out.num_scheduled_tokens.items():
            dry += self.check_plan(self.requests[request_id], count, plan)
        planned = plan.observe.keys() | plan.compress.keys()
        require(planned <= out.num_scheduled_tokens.keys(), "planned for nobody")
        counted = plan.skipped.get("pool_dry", 0)
        require(counted == dry, counted, "times the pool was dry, and not", dry)
        for request in self.scheduler.running:
            self.check_request(request, plan)
        for window in self.worker.compression._windows:
            for request_id, chunks in window.queries.items():
                course = self.scheduler._courses.get(request_id)
                most = course.window if course else 0
                require(sum(map(len, chunks)) <= most, "windows pile up")
        self.check_pool()
        self.seen["hits"] += sum(
            new.num_computed_tokens > 0 for new in out.scheduled_new_reqs
        )
        self.seen["pool dry"] += dry

    def course(self, request: Request) -> Course:
        """What has to become of a request since it was last admitted."""
        life = (request, request.num_preemptions)
        before, course = self.courses.get(request.request_id, (None, None))
        if course is None or before != life:
            params = request.sampling_params
            course = Course(
                self.config,
                self.tiers,
                request.num_prompt_tokens,
                params.max_tokens,
                params.extra_args or {},
                self.load.room,
            )
            self.courses[request.request_id] = (life, course)
        return course

    def check_hit(self, request: Request) -> Any:
        """A prefix is hit as ever, but for what a compression has to see computed."""
        found, scheduler = self.find_hit(request), self.scheduler
        limit, scheduler._hit_limit = scheduler._hit_limit, None
        hit = stock = Scheduler._get_local_prefix_cache_hit(scheduler, request)[1]
        scheduler._hit_limit = limit
        if wanted := self.course(request).next:
            most = (wanted.due - max(wanted.window, 1)) // BLOCK
            hit = 0 if wanted.prune else min(stock, most * BLOCK)
        # Sliding windows are not held at every length.
        fits = found[1] == hit or ("W" in self.load.groups and found[1] < hit < stock)
        require(fits, request.request_id, "hits", found[1], "tokens and not", hit)
        return found

    def check_plan(self, request: Request, count: int, plan: StepPlan) -> int:
        """A request is cut where a compression is due, and compressed there.

        So it is when it comes back after a preemption: what follows then sees what it
        saw before. Only a group without private blocks waits, for the same tokens.

        Returns:
            How many compressions are late from now on.
        """
        request_id, end = request.request_id, request.num_computed_tokens
        course = self.course(request)
        observed = plan.observe.get(request_id)
        now = plan.compress.get(request_id, {})
        wanted = course.next
        if wanted is None:
            require(not (observed or now), request_id, "has to stay as it is")
            return 0
        start, due = end - count, wanted.due
        first, last = max(start, due - wanted.window), min(end, due)
        window = (first - start, last - start) if first < last else None
        require(observed == window, request_id, "observed", observed, "not", window)
        whole = not wanted.prune or (start == 0 and end >= due)
        require(whole, request_id, "is pruned in two steps")
        if end < due:
            require(not now, request_id, "is compressed too early", now)
            return 0
        require(end == due or wanted.late, request_id, "is not cut", start, due, end)
        was_late = wanted.late
        if not was_late:
            targets = {wanted.targets.get(group) for group in self.tiers}
            self.seen["tiers apart"] += len(targets) > 1
        for group, do in now.items():
            require(group in wanted.targets, request_id, "group", group, "unasked", do)
            target = wanted.targets[group]
            pruned = wanted.prune and min(self.tiers[group]) > 0
            asked = (wanted.scorer, due, wanted.window, *target, course.lost(group))
            done = (do.scorer, do.num_tokens, do.window, do.end_block)
            done = (*done, len(do.destination), do.candidates, do.shift)
            require((*done, do.pruned) == (*asked, pruned), do, "and not", asked)
            self.count(request, do)
        course.planned(wanted, now, end)
        require(not (wanted.prune and wanted.late), request_id, "is pruned too late")
        for group, target in wanted.targets.items():
            self.check_dry(request_id, group, target)
        return wanted.late and not was_late

    def check_dry(self, request_id: str, group: int, target: Target) -> None:
        """A group waits for no other reason than private blocks.

        None has become free since it asked: blocks are freed between steps.
        """
        manager = self.managers[group]
        require(request_id in manager._compressed, request_id, "was to be compressed")
        state = manager._compressed[request_id]
        stay = target.candidates[0] // BLOCK if target.candidates else 0
        listed = manager.req_to_blocks[request_id]
        source = state.destination + listed[state.end_block : target.end_block]
        own = [b for b in source[stay:] if b.ref_cnt == 1]
        room = stay + len(own) + self.pool.get_num_free_blocks()
        what = f"{request_id} group {group}"
        require(room < target.kept, what, "waits with room for", room)

    def count(self, request: Request, do: Compress) -> None:
        """Count a compression, and of what kind it is."""
        prompt = request.num_prompt_tokens
        kinds = {
            "while reading": do.num_tokens < prompt,
            "while generating": do.num_tokens > prompt,
            "once more": do.shift > 0,
            "again": request.num_preemptions > 0,
            "pruned": do.pruned,
            "generated tokens go": do.candidates is not None,
            "late": request.num_computed_tokens > do.num_tokens,
            "by another method": do.scorer in self.config.request_methods,
            "beyond the pool": prompt > (len(self.pool.blocks) - 1) * BLOCK,
        }
        self.seen["compressions"] += 1
        self.seen["freed"] += do.freed_blocks
        self.seen.update(kind for kind, holds in kinds.items() if holds)

    def check_request(self, request: Request, plan: StepPlan) -> None:
        """What a running request holds, in each group."""
        request_id = request.request_id
        life, course = self.worker.lives[request_id], self.course(request)
        for group, manager in enumerate(self.managers):
            blocks = manager.req_to_blocks[request_id]
            self.check_entries(blocks, life.slots[group])
            if not isinstance(manager, CompressedKVManager):
                continue
            state = manager._compressed.get(request_id)
            destination = state.destination if state else []
            known = [block.block_id for block in destination]
            kept = life.kept[group].destination if group in life.kept else ()
            require(known == list(kept), "the worker keeps", kept, "not", known)
            self.check_private(destination[course.front.get(group, 0) :])
            nulls = [block.is_null for block in blocks]
            replaced = course.replaced[group]
            wanted = [entry < replaced for entry in range(len(blocks))]
            require(nulls == wanted, request_id, "null entries", nulls, wanted)
            # Invariant 5: as many blocks as budget.py says.
            kept, formula = len(destination), course.private[group]
            require(kept == formula, request_id, "keeps", kept, "and not", formula)
            held = nulls.count(False) + kept
            formula = -(-request.num_computed_tokens // BLOCK) - course.lost(group)
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

    def check_private(self, filled: list[Any]) -> None:
        """Invariants 2, 6: no hash leads to blocks that were filled, and one request.

        A block with one reference is in one request, see `check_pool`.
        """
        for block in filled:
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
            scheduler._courses,
            scheduler._exact_tokens,
            self.worker.lives,
            *(manager._compressed for manager in scheduler._managers.values()),
            *(executor.row_shift(group)._shift_of for group in scheduler._managers),
            *(window.queries for window in executor._windows),
        ]
        require(not any(left), "something is left", left)
        totals, seen = executor.totals, self.seen
        require(totals.compressions == seen["compressions"], "compressions", totals)
        require(totals.blocks_freed == seen["freed"], "freed blocks", totals)
        evicted = seen["freed"] * BLOCK
        require(totals.tokens_evicted == evicted, "evicted tokens", totals)
