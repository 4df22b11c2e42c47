"""A worker's half of compression: it obeys the scheduler's plan, step by step.

During a forward the attention layers capture the queries of observation windows;
after it the planned prompts are scored, their kept tokens copied into private
blocks, and their rows of the block table shortened.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.kv_cache_interface import KVCacheConfig

from ..config import KEY, KVCompressionConfig
from ..methods.minicache import MiniCache
from ..ops.select import select
from ..plan import Compress, Counters, Report, StepPlan
from .head_pages import HeadPages
from .heads import rate
from .kernels import choose_kernels
from .layers import paired_layers, reads_from
from .layout import kernel_blocks
from .merging import merge_groups
from .observation import ObservationWindow, observed
from .one_head import check_pages
from .overflow import Overflow
from .page_formats import KEYS, VALUES, find_scales, pages_of
from .pruner import Pruner, Tier
from .rows import RowShift
from .shared_pages import SharingRows
from .spec import CompressedAttentionSpec
from .uneven import HeldLayer, keep_by_head

WriteRow = Callable[[int, str, int, tuple[int, ...]], None]
ReadRow = Callable[[int, str, int, int], torch.Tensor]


@dataclass
class _Group:
    """One compressed KV cache group of this worker."""

    index: int
    layers: list[Any]
    block_size: int
    rows: RowShift


class CompressionExecutor:
    """What a model runner calls around each step."""

    def __init__(self, config: KVCompressionConfig, device: torch.device) -> None:
        self._config, self._scorers = config, config.scorers
        self._device = device
        self._groups: dict[int, _Group] = {}
        self._windows: list[ObservationWindow] = []
        self._spans: list[tuple[str, int, int]] = []
        self._plan = StepPlan()
        # Set by the runner, where a scorer prunes.
        self.pruner: Pruner | None = None
        self.totals = Counters()
        self._overflow = Overflow()

    def bind(
        self,
        kv_cache_config: KVCacheConfig,
        layers: dict[str, Any],
        max_num_reqs: int,
    ) -> None:
        """Learn the groups once KV caches exist; a profiling run's come first.

        Args:
            kv_cache_config: This worker's groups.
            layers: Layer name -> attention layer.
            max_num_reqs: Most requests in a batch.
        """
        self._groups.clear()
        self._windows.clear()
        uneven = any(scorer.uneven for scorer in self._scorers.values())
        pairs = paired_layers(layers.values(), self._config)
        factors: dict[int, torch.Tensor] = {}
        for index, spec in enumerate(kv_cache_config.kv_cache_groups):
            kv_spec = spec.kv_cache_spec
            if not isinstance(kv_spec, CompressedAttentionSpec):
                continue
            # None on a pipeline stage without layers of this group. vLLM lists those
            # that read another's cache as well.
            named = [layers[name] for name in spec.layer_names]
            own = [layer for layer in named if reads_from(layer) is None]
            rows = RowShift(max_num_reqs, self._device)
            if uneven:
                rows = HeadPages(max_num_reqs, self._device, kv_spec.num_kv_heads)
            elif own and own[0] in pairs:
                rows = SharingRows(max_num_reqs, self._device)
                rows.bind([(pairs[layer], layer) for layer in own], factors)
            group = self._groups[index] = _Group(index, own, kv_spec.block_size, rows)
            if uneven:
                for layer in group.layers:
                    check_pages(layer.kv_cache)
            if any(scorer.needs_queries for scorer in self._scorers.values()):
                for layer in named:
                    layer.observation_window = ObservationWindow(self._spans)
                    self._windows.append(layer.observation_window)
        for layer in layers.values():
            find_scales(layer)
        own = [layer for group in self._groups.values() for layer in group.layers]
        choose_kernels(self._config, own, self._device)

    def bind_pruner(self, model: Any, builders: dict[int, Any]) -> None:
        """Learn the model's layers, if a scorer prunes them.

        Args:
            model: vLLM's.
            builders: KV cache group -> builder of its attention metadata.
        """
        if not any(scorer.prunes for scorer in self._scorers.values()):
            return
        tiers = [
            Tier(index, group.block_size, builders[index], group.layers)
            for index, group in self._groups.items()
        ]
        tiers.sort(key=lambda tier: tier.layers[0].compressed_index)
        self.pruner = Pruner(model, tiers, self._scorers)

    def row_shift(self, group: int) -> RowShift | None:
        """The group's row shift, None if the group is not compressed."""
        return self._groups[group].rows if group in self._groups else None

    def begin_step(
        self, plan: StepPlan | None, request_ids: Sequence[str], counts: Sequence[int]
    ) -> None:
        """Take a step's plan before its forward.

        Args:
            plan: The scheduler's directive, None if there is none.
            request_ids: Requests in the order of the batch's rows.
            counts: Tokens of each row.
        """
        if self._plan:
            raise RuntimeError(f"{KEY}: a step came before the last one's compression")
        self._plan = plan or StepPlan()
        for group in self._groups.values():
            group.rows.begin(request_ids)
        self._spans.clear()
        if not self._plan.observe:
            return
        first = 0
        for request_id, count in zip(request_ids, counts, strict=True):
            if span := self._plan.observe.get(request_id):
                self._spans.append((request_id, first + span[0], first + span[1]))
            first += int(count)
        if self.pruner:
            self.pruner.begin(self._plan, request_ids, counts, self._spans)

    def drop_plan(self) -> None:
        """The step's forward has failed."""
        self._plan = StepPlan()

    def end_forward(self) -> None:
        """Later batches are dummies until the next `begin_step`."""
        self._spans.clear()
        for group in self._groups.values():
            group.rows.begin(())
        if self.pruner:
            self.pruner.end()

    def finish_step(self, read_row: ReadRow, write_row: WriteRow) -> Report:
        """Execute the plan after the forward and report what was done.

        Args:
            read_row: ``(group, request id, first, end)`` -> physical blocks at these
                entries of the row, int64 on the device.
            write_row: ``(group, request id, first entry, block ids)``.
        """
        plan, self._plan = self._plan, StepPlan()
        report = Report()
        if not plan:
            return report
        started = time.perf_counter()
        for request_id, groups in plan.compress.items():
            self._execute(request_id, groups, read_row)
            for index, directive in groups.items():
                group = self._groups[index]
                first, size = directive.shift, group.block_size
                shift = directive.new_shift
                write_row(index, request_id, shift, directive.destination)
                group.rows.set(request_id, shift * size)
                report.compressions += 1
                report.tokens_evicted += (shift - first) * size
                if directive.owner is not None:
                    report.tokens_merged += directive.merged_blocks * size
                report.blocks_freed += directive.freed_blocks
                report.logical_tokens += directive.num_tokens - first * size
                report.retained_tokens += directive.num_tokens - shift * size
        self._overflow.report(plan, report)
        for request_id, count in plan.observed.items():
            for window in self._windows:
                window.keep(request_id, count)
        if plan.compress:
            report.seconds = time.perf_counter() - started
        self.totals.add(report)
        self.totals.add(Counters(skipped=plan.skipped))
        return report

    def _execute(
        self, request_id: str, groups: Mapping[int, Compress], read_row: ReadRow
    ) -> None:
        """Fill a request's private blocks in all groups; rows stay as they are."""
        rows = {}
        for index, directive in groups.items():
            if not directive.pruned:
                end = -(-directive.num_tokens // self._groups[index].block_size)
                rows[index] = read_row(index, request_id, directive.shift, end)
        owners = {directive.owner for directive in groups.values()}
        for index, directive in groups.items():
            if directive.owner is not None and self._groups[index].layers:
                pair = (directive.owner, index)
                self._merge(request_id, pair, groups, [rows[group] for group in pair])
            elif index not in owners and not directive.pruned:
                group = self._groups[index]
                self._compress(group, request_id, rows[index], directive)

    def _merge(
        self,
        request_id: str,
        pair: tuple[int, int],
        directives: Mapping[int, Compress],
        rows: Sequence[torch.Tensor],
    ) -> None:
        """Merge what the layers of two groups hold of a request."""
        groups = [self._groups[index] for index in pair]
        scorer, sharing = self._scorers[directives[pair[1]].scorer], groups[1].rows
        if not (isinstance(scorer, MiniCache) and isinstance(sharing, SharingRows)):
            raise TypeError(f"{KEY}: {scorer.name} merges no layers")
        shared = merge_groups(
            scorer,
            request_id,
            list(zip(*(group.layers for group in groups), strict=True)),
            rows,
            [directives[index] for index in pair],
            groups[0].block_size,
        )
        if len(shared):
            sharing.share(request_id, shared)

    @torch.inference_mode()
    def _compress(
        self, group: _Group, request_id: str, row: torch.Tensor, directive: Compress
    ) -> None:
        """Score a request in every layer of a group, and copy its kept tokens."""
        scorer = self._scorers[directive.scorer]
        num_tokens = directive.num_tokens - directive.shift * group.block_size
        candidates = (directive.end_block - directive.shift) * group.block_size
        blocks = directive.destination + directive.overflow
        named = torch.tensor(blocks, dtype=torch.long)
        private = named.to(self._device, non_blocking=True)
        by_head: list[HeldLayer] = []
        for layer in group.layers:
            cache, pages = layer.kv_cache, pages_of(layer)
            source = kernel_blocks(row, group.block_size // cache.shape[2])
            target = kernel_blocks(private, group.block_size // cache.shape[2])
            queries = values = None
            if scorer.needs_queries:
                queries = observed(layer, request_id, directive.window)
            if scorer.uneven:  # by what all layers together want
                by_head.append(HeldLayer(layer, pages_of(layer, True), queries))
                continue
            held = source.expand(cache.shape[1], -1)
            if scorer.needs_values:
                values = pages.vectors(VALUES, held, num_tokens).dense()
            keys = pages.vectors(KEYS, held, num_tokens)
            scores = rate(scorer, layer, queries, keys, values)[:, :candidates]
            if directive.candidates:
                first, end = directive.candidates
                scores = scores.clone()
                scores[:, :first] = scores[:, end:] = float("inf")
                stay = first // cache.shape[2]
                scores = scores[:, stay * cache.shape[2] :]
                source, target = source[stay:], target[stay:]
            kept = select(scores, len(target) * cache.shape[2])
            pages.compact(source, kept, target)
        if isinstance(group.rows, HeadPages) and by_head:
            split = group.block_size // cache.shape[2]
            mean = len(directive.destination)
            filled = keep_by_head(
                scorer,
                by_head,
                source,
                kernel_blocks(named, split),
                mean * split,
                num_tokens,
                candidates,
                group.rows,
                request_id,
            )
            self._overflow.fill(request_id, group.index, -(-filled // split) - mean)

    def forget(self, request_id: str) -> None:
        """Drop a request that finished, was preempted or starts anew."""
        for group in self._groups.values():
            group.rows.forget(request_id)
        self._overflow.forget(request_id)
        for window in self._windows:
            window.keep(request_id, 0)
