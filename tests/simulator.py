"""Workers whose memory knows what it holds, for simulations of the scheduler.

Our halves of the model runners, the executor and its row shifts are the real ones.
Model and KV cache are shadows: each slot of each block remembers *which* KV it holds,
so what attention would read is compared with what the request needs. A broken
invariant raises `Violation`.
"""

from collections.abc import Mapping, Sequence
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from tests.shadow import BLOCK, Layer, Life, Slot
from tests.shadow_executor import Executor
from vllm_kvcompress.config import KEY, KVCompressionConfig
from vllm_kvcompress.engine.check.ledger import require
from vllm_kvcompress.engine.runner import RunnerV1
from vllm_kvcompress.engine.shared_pages import SharingRows
from vllm_kvcompress.engine.spec import CompressedAttentionSpec
from vllm_kvcompress.plan import Compress


class Worker:
    """What is left of vLLM's runners; `RunnerV1` or `RunnerV2` goes on top."""

    def __init__(
        self, vllm_config: VllmConfig, kv_config: KVCacheConfig, pool: BlockPool
    ) -> None:
        specs = [group.kv_cache_spec for group in kv_config.kv_cache_groups]
        num_rows = vllm_config.scheduler_config.max_num_seqs
        width = -(-vllm_config.model_config.max_model_len // BLOCK)
        self.spans = [getattr(spec, "sliding_window", None) for spec in specs]
        self.pool = pool
        self.memory: list[list[Any]] = [[None] * BLOCK for _ in pool.blocks]
        self.lives: dict[str, Life] = {}
        self.uids = count(1)
        self.rows: dict[str, int] = {}
        self.free_rows = list(range(num_rows))
        rows = [torch.zeros(num_rows, width, dtype=torch.int32) for _ in specs]
        self.tables = [SimpleNamespace(gpu=t, get_numpy_array=t.numpy) for t in rows]
        kv_cache = torch.zeros(len(pool.blocks), 1, BLOCK, 2)  # of all layers
        self.layers: list[Any] = [Layer(group, kv_cache) for group in range(len(specs))]
        for layer, spec in zip(self.layers, specs, strict=True):
            if isinstance(spec, CompressedAttentionSpec):
                layer.compressed_index = spec.tier[0]
                layer.compressed_layers = sum(
                    len(getattr(each, "tier", ())) for each in specs
                )
        config = KVCompressionConfig.from_dict(vllm_config.additional_config[KEY])
        self.device = torch.device("cpu")
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

    def scales(self) -> list[torch.Tensor]:
        """Factors of all deep layers."""
        found = [getattr(layer, "page_scales", None) for layer in self.layers]
        return [scales for scales in found if scales is not None]

    # Requests ------------------------------------------------------------------

    def _begin(self, new: Any, tokens: list[int]) -> None:
        """Start a life, of a new request or of one that comes back."""
        slots: list[list[Slot]] = [[] for _ in self.tables]
        life = Life(next(self.uids), list(tokens), new.prompt_len, slots)
        life.compute(new.num_computed_tokens)
        self.lives[new.req_id] = life
        blocks = [list(ids) for ids in new.block_ids]
        self.requests[new.req_id] = SimpleNamespace(block_ids=blocks)

    def _append(self, request_id: str, blocks: Any) -> None:
        """Add blocks to a request, and to its row."""
        state = self.requests[request_id]
        for table, mine, new in zip(
            self.tables, state.block_ids, blocks or (), strict=False
        ):
            mine += new
            if (row := self.rows.get(request_id)) is not None:
                start = len(mine) - len(new)
                table.gpu[row, start : len(mine)] = torch.tensor(new).int()

    def _enter(self, request_id: str) -> None:
        """Give a request a row."""
        row = self.rows[request_id] = self.free_rows.pop()
        state = self.requests[request_id]
        for table, ids in zip(self.tables, state.block_ids, strict=True):
            table.gpu[row, : len(ids)] = torch.tensor(ids).int()

    def _leave(self, request_id: str) -> None:
        if request_id in self.rows:
            self.free_rows.append(self.rows.pop(request_id))

    def _update_states(self, out: SchedulerOutput) -> None:
        """V1: a row lives as long as its request is scheduled in each step."""
        cached, scheduled = out.scheduled_cached_reqs, out.num_scheduled_tokens
        for request_id in out.finished_req_ids:
            self.lives.pop(request_id, None)
        left = self.rows.keys() - scheduled.keys() | cached.resumed_req_ids
        for request_id in sorted(left | out.finished_req_ids):
            self._leave(request_id)
        for new in out.scheduled_new_reqs:
            self._begin(new, new.prompt_token_ids)
        for i, request_id in enumerate(cached.req_ids):
            if request_id in cached.resumed_req_ids:
                again = SimpleNamespace(
                    req_id=request_id,
                    prompt_len=self.lives[request_id].prompt,
                    num_computed_tokens=cached.num_computed_tokens[i],
                    block_ids=cached.new_block_ids[i],
                )
                self._begin(again, cached.all_token_ids[request_id])
            else:
                self._append(request_id, cached.new_block_ids[i])
        for request_id in scheduled:
            if request_id not in self.rows:
                self._enter(request_id)
        self.input_batch.req_ids = sorted(self.rows, key=lambda r: self.rows[r])

    def _remove_request(self, request_id: str) -> bool:
        """V2."""
        self._leave(request_id)
        return self.lives.pop(request_id, None) is not None

    def _update_requests(self, out: SchedulerOutput) -> None:
        """V2: preempted requests are removed, and come back as new ones."""
        cached = out.scheduled_cached_reqs
        left = out.finished_req_ids | (out.preempted_req_ids or set())
        for request_id in sorted(left):
            self._remove_request(request_id)
        for new in out.scheduled_new_reqs:
            self._remove_request(new.req_id)
            self._begin(new, new.prefill_token_ids)
            self._enter(new.req_id)
        for request_id, ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            self._append(request_id, ids)
        self.input_batch.req_ids = list(out.num_scheduled_tokens)

    def _prepare_inputs(self, out: SchedulerOutput, counts: np.ndarray) -> None:
        """V1, after ours."""

    def prepare_attn(self, batch: Any) -> None:
        """V2, after ours."""

    # Steps ---------------------------------------------------------------------

    def execute_model(self: Any, out: SchedulerOutput) -> ModelRunnerOutput | None:
        """Write the batch's tokens, show its queries, and read as attention does."""
        v1 = isinstance(self, RunnerV1)
        self._update_states(out) if v1 else self._update_requests(out)
        batch = self.input_batch.req_ids
        counts = np.array([out.num_scheduled_tokens[r] for r in batch])
        if not batch:
            return EMPTY_MODEL_RUNNER_OUTPUT
        if v1:
            self._prepare_inputs(out, counts)
        else:
            rows = SimpleNamespace(req_ids=batch, num_scheduled_tokens=counts)
            self.prepare_attn(rows)
        queries = []
        admitted = {new.req_id for new in out.scheduled_new_reqs}
        admitted |= out.scheduled_cached_reqs.resumed_req_ids
        for request_id, tokens in zip(batch, counts.tolist(), strict=True):
            life, row = self.lives[request_id], self.rows[request_id]
            # One that is just admitted has no drafts; vLLM pads its chunk.
            drafts = len(out.scheduled_spec_decode_tokens.get(request_id, ()))
            life.draft(drafts, request_id in admitted)
            groups = self.compression._plan.compress.get(request_id, {})
            pruned = {group: do for group, do in groups.items() if do.pruned}
            for position in life.compute(tokens, bool(pruned)):
                queries.append((life.uid, position))
                tables = zip(self.tables, life.slots, strict=True)
                for group, (table, slots) in enumerate(tables):
                    if group in pruned and position < pruned[group].end_block * BLOCK:
                        continue
                    block = int(table.gpu[row, position // BLOCK])
                    require(block > 0, "a token is written to the null block")
                    self.memory[block][position % BLOCK] = slots[position]
            for group, do in pruned.items():
                require(do.num_tokens == tokens, do, "prunes", tokens, "tokens")
                self.fill(life, group, do)
        for layer in self.layers:
            if window := getattr(layer, "observation_window", None):
                window.capture(torch.tensor(queries))
        for group in range(len(self.tables)):
            self._attend(group, batch, counts.tolist())
        return None

    def fill(self, life: Life, group: int, do: Compress, stay: int = 0) -> None:
        """Write the tokens that are kept behind the blocks which stay."""
        life.pack(group, do)
        for i, block in list(enumerate(do.destination))[stay:]:
            self.memory[block] = life.private[group][i * BLOCK : (i + 1) * BLOCK]

    def merge(
        self,
        scorer: Any,
        life: Life,
        directives: Mapping[int, Compress],
        parts: Sequence[Any],
        sizes: Mapping[str, int],
    ) -> None:
        """Write what two layers keep, and the deep one's factors."""
        pair = [part.layer.group for part in parts]
        do = directives[pair[1]]
        stay = do.candidates[0] // BLOCK if do.candidates else 0
        candidates = (do.end_block - do.shift - stay) * BLOCK
        selected = candidates > (len(do.destination) - stay) * BLOCK
        for group, part in zip(pair, parts, strict=True):
            source = life.held(group)[stay * BLOCK : do.num_tokens - do.shift * BLOCK]
            self.expect(part.source.tolist(), source, f"group {group} merges")
            asked = {"num_tokens": len(source), "candidates": candidates}
            asked["merged_blocks"] = do.merged_blocks
            require(sizes == asked, "merges", sizes, "instead of", asked)
            if selected and scorer.needs_queries:
                life.check_window(part.queries, directives[group])
        life.merge(pair, directives)
        for group, part in zip(pair, parts, strict=True):
            for i, block in enumerate(part.target.tolist(), start=stay):
                slots = life.private[group][i * BLOCK : (i + 1) * BLOCK]
                self.memory[block] = slots
        shared = parts[1].target[: do.merged_blocks]
        (factor,) = {*life.factors(life.private[pair[1]])} - {1} or {1}
        parts[1].layer.page_scales[:, shared] = factor

    def _attend(self, group: int, batch: list[str], counts: list[int]) -> None:
        """Read the rows as kernels do: shifted left, and shorter."""
        lens = torch.tensor([self.lives[r].computed for r in batch]).int()
        seen = SimpleNamespace(
            block_table_tensor=self.tables[group].gpu[[self.rows[r] for r in batch]],
            seq_lens=lens,
            seq_lens_cpu_upper_bound=lens,
            max_seq_len=int(lens.max()),
            replace=lambda **fields: SimpleNamespace(**fields),
        )
        if shift := self.compression.row_shift(group):
            seen = shift.physical(seen, BLOCK, shift.new_lens())
        if isinstance(shift, SharingRows):
            merges = [self.lives[r].merges(group) for r in batch]
            found, wanted = shift.sharing(), [i for i, m in enumerate(merges) if m]
            require(found == wanted, "rows", found, "share pages, not", wanted)
        rows, lengths = seen.block_table_tensor.tolist(), seen.seq_lens.tolist()
        for i, (request_id, row) in enumerate(zip(batch, rows, strict=True)):
            life, length = self.lives[request_id], lengths[i]
            do = self.compression._plan.compress.get(request_id, {}).get(group)
            if do and do.pruned:  # it reads what it has just written
                continue
            wanted = life.held(group)
            fits = length == len(wanted) <= seen.max_seq_len
            require(fits, "length", length, "instead of", len(wanted))
            span = self.spans[group] or length
            first = max(0, length - counts[i] - span + 1) // BLOCK
            what = f"{request_id} group {group}"
            blocks = row[first : -(-length // BLOCK)]
            self.expect(blocks, wanted[first * BLOCK :], what)
            if (scales := getattr(self.layers[group], "page_scales", None)) is not None:
                self.expect_factors(scales[:, blocks], life.factors(wanted), what)

    def expect(self, blocks: list[int], wanted: list[Slot], what: str) -> None:
        """Invariants 3 and 7: what is read is still held, and is what is needed."""
        for block in blocks:
            require(self.pool.blocks[block].ref_cnt > 0, what, "reads free", block)
        found = [slot for block in blocks for slot in self.memory[block]]
        require(found[: len(wanted)] == wanted, what, found, "instead of", wanted)

    def expect_factors(
        self, scales: torch.Tensor, wanted: list[int], what: str
    ) -> None:
        """Each token is read with its own factor, and most with none."""
        for found in scales.flatten(1).tolist():
            same = found[: len(wanted)] == wanted
            require(same, what, "has factors", found, "instead of", wanted)

    def sample_tokens(self) -> ModelRunnerOutput:
        batch, sampled = list(self.input_batch.req_ids), []
        for life in (self.lives[request_id] for request_id in batch):
            whole = life.computed == len(life.tokens)
            require(whole or not life.drafted, "drafts in the middle of a prompt")
            sampled.append(life.sample() if whole else [])
        return ModelRunnerOutput(batch, {r: i for i, r in enumerate(batch)}, sampled)
