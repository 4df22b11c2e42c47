"""vLLM's engine core with our scheduler, checked after each step.

A `Run` takes a workload through it. The workers are those of tests/simulator.py, and
what has to become of each request is worked out by `Course`.
"""

from collections import Counter, deque
from typing import Any
from unittest.mock import Mock

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from tests.shadow import BLOCK, STOP, chain
from tests.simulator import Worker
from tests.unit.course import Course, Next
from tests.unit.engines import configs
from tests.unit.invariants import Checks
from tests.unit.workloads import MAX_LEN, RUNNERS, Workload
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.engine.check.ledger import require
from vllm_kvcompress.engine.check.scheduler import (
    CheckedAsyncScheduler,
    CheckedScheduler,
)
from vllm_kvcompress.engine.requests import USAGE_KEY
from vllm_kvcompress.plan import Compress, StepPlan

PATIENCE = 300  # steps without a new token or a finished request


class Run(Checks):
    """A workload under way."""

    def __init__(self, load: Workload) -> None:
        self.load = load
        config, kv_config = configs(load)
        cls = CheckedAsyncScheduler if load.asynchronous else CheckedScheduler
        self.scheduler: Any = cls(
            vllm_config=config,
            kv_cache_config=kv_config,
            structured_output_manager=Mock(validate_tokens=lambda _, drafts: drafts),
            block_size=BLOCK,
        )
        self.scheduler.use_v2_model_runner = load.runner == "V2"
        if load.lookahead:
            self.scheduler.num_lookahead_tokens = load.drafts
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
        self.waited: Counter[Request] = Counter()  # steps without private blocks
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
            full = len(self.queue) == self.load.in_flight
            if full or not self.scheduler.has_requests():
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
            extra_args={**(arrival.extra_args or {}), USAGE_KEY: True},
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
            if what == "again" and self.load.in_flight == 1:
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
        if not self.queue:
            return
        out, result = self.queue.popleft()
        for message in self.scheduler.update_from_output(out, result).values():
            for output in message.outputs:
                self.check_usage(output)
        if self.load.drafts and not self.load.asynchronous:
            most = self.load.drafts + 1
            drafts = [[1] * (sum(tokens) % most) for tokens in result.sampled_token_ids]
            self.scheduler.update_draft_token_ids(DraftTokenIds(result.req_ids, drafts))

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
            self.check_request(request)
        for window in self.worker.compression._windows:
            for request_id, chunks in window.queries.items():
                course = self.scheduler._courses.get(request_id)
                most = course.window if course else 0
                require(sum(map(len, chunks)) <= most, "windows pile up")
        self.check_content()
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
            most = wanted.due - max(wanted.window, 1)
            if self.load.drafts:  # a chunk of one token would get some
                most = max(0, min(most, request.num_tokens - 2))
            hit = 0 if wanted.prune else min(stock, most // BLOCK * BLOCK)
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
        request_id, course = request.request_id, self.course(request)
        life = self.worker.lives[request_id]
        # What counts is computed for good; a scheduler may hope for more.
        start, end = life.began, life.computed
        self.seen["drafts rejected"] += start + count > end
        self.seen["drafts accepted"] += end > start + count - life.drafted
        observed = plan.observe.get(request_id)
        now = plan.compress.get(request_id, {})
        wanted = course.next
        if wanted is None:
            require(not (observed or now), request_id, "has to stay as it is")
            return 0
        due = wanted.due
        if life.drafted and 0 < start < due:  # at 0 vLLM pads a chunk of one token
            reached = start + count
            firm = due - max(wanted.window, 1)
            require(reached <= firm, request_id, "drafts", reached, "where due", due)
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
            fit = (target.end_block, target.kept, target.candidates)
            asked = (wanted.scorer, due, wanted.window, *fit, course.lost(group))
            done = (do.scorer, do.num_tokens, do.window, do.end_block)
            done = (*done, len(do.destination), do.candidates, do.shift)
            merges = do.merged_blocks and (do.owner, do.merged_blocks)
            owner = target.merged and (course.owners.get(group), target.merged)
            done, asked = (*done, do.pruned, merges), (*asked, pruned, owner)
            require(done == asked, do, "and not", asked)
            self.count(request, do)
        merging = self.config.scorers[wanted.scorer].merges
        for deep, shallow in course.owners.items() if merging else ():
            both = (deep in now) == (shallow in now)
            require(both, request_id, "merges", shallow, "and", deep, "apart", now)
        self.count_blocks(course, wanted, now, request.num_computed_tokens)
        require(not (wanted.prune and wanted.late), request_id, "is pruned too late")
        for group in wanted.targets:
            if not (merging and group in course.owners.values()):
                self.check_dry(request_id, group, wanted, merging)
        self.waited[request] += wanted.late
        return wanted.late and not was_late

    def count(self, request: Request, do: Compress) -> None:
        """Count a compression, and of what kind it is."""
        prompt = request.num_prompt_tokens
        kinds = {
            "while reading": do.num_tokens < prompt,
            "while generating": do.num_tokens > prompt,
            "once more": do.shift > 0,
            "again": request.num_preemptions > 0,
            "pruned": do.pruned,
            "generated tokens go": do.candidates and not do.merged_blocks,
            "merges": do.merged_blocks > 0,
            "generated tokens merge": do.candidates and do.merged_blocks,
            "selected, then merged": do.merged_blocks and do.new_shift > do.shift,
            "late": request.num_computed_tokens > do.num_tokens,
            "by another method": do.scorer in self.config.request_methods,
            "beyond the pool": prompt > (len(self.pool.blocks) - 1) * BLOCK,
        }
        self.seen["compressions"] += 1
        self.seen.update(kind for kind, holds in kinds.items() if holds)

    def count_blocks(self, course: Course, wanted: Next, now: Any, end: int) -> None:
        """Go on with a course, and count the blocks that its groups give back."""

        def gone(group: int) -> tuple[int, int]:
            return course.lost(group), course.borrowed(group)

        before = {group: gone(group) for group in now}
        course.planned(wanted, now, end)
        for group, (lost, borrowed) in before.items():
            self.seen["evicted"] += course.lost(group) - lost
            self.seen["merged"] += course.borrowed(group) - borrowed
            self.seen["freed"] += sum(gone(group)) - lost - borrowed
