"""Workers that compare what they read and write with what the scheduler holds."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from ...plan import Report, StepPlan
from .. import executor as executing
from .. import uneven
from .. import worker as workers
from ..executor import CompressionExecutor, ReadRow, WriteRow
from ..layout import kernel_blocks
from ..page_formats import VALUES, pages_of
from .ledger import require
from .scheduler import Expected


class _CheckedWorker:
    """Mixed into one of our workers."""

    def init_device(self: Any) -> None:
        super().init_device()  # type: ignore[misc]
        _derive(self.model_runner, _CheckedRunner)
        _derive(self.model_runner.compression, _CheckedExecutor)
        _check_selection()


class _CheckedRunner:
    """Mixed into one of our model runners."""

    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(*args, **kwargs)  # type: ignore[misc]
        specs = self.kv_cache_config.kv_cache_groups
        for index, groups in enumerate(self.attn_groups):
            for builder in (b for g in groups for b in g.metadata_builders):
                if hasattr(builder, "row_shift"):
                    size = specs[index].kv_cache_spec.block_size
                    _Rows(builder, self.compression, index, size)

    def execute_model(
        self: Any, scheduler_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        expected = getattr(scheduler_output, "kv_compression_check", None)
        self.compression.expected = expected
        if expected and expected.stale:
            self._poison(expected.stale)
        return super().execute_model(  # type: ignore[misc]
            scheduler_output, *args, **kwargs
        )

    def _poison(self: Any, stale: list[int]) -> None:
        """Let blocks answer every query, and with something huge.

        Not NaN: vLLM's kernel for processors multiplies values behind a row's end by 0.
        """
        stale_blocks = torch.tensor(stale, device=self.device)
        context = self.vllm_config.compilation_config.static_forward_context
        for index, group in enumerate(self.kv_cache_config.kv_cache_groups):
            if self.compression.row_shift(index) is None:
                continue
            for layer in (context[name] for name in group.layer_names):
                cache, pages = layer.kv_cache, pages_of(layer)
                split = group.kv_cache_spec.block_size // cache.shape[2]
                blocks = kernel_blocks(stale_blocks, split)
                huge = pages.take(VALUES, blocks)
                floats = huge.is_floating_point()
                huge.fill_(torch.finfo(huge.dtype).max if floats else 0x7E)
                cache[blocks] = 0  # keys like this one suit no query badly
                pages.write(VALUES, blocks, huge)


class _CheckedExecutor(CompressionExecutor):
    """It knows whose rows the batch has, and looks at those it has written."""

    expected: Expected | None = None
    request_ids: Sequence[str] = ()

    def begin_step(
        self, plan: StepPlan | None, request_ids: Sequence[str], counts: Sequence[int]
    ) -> None:
        self.request_ids = tuple(request_ids)
        super().begin_step(plan, request_ids, counts)

    def end_forward(self) -> None:
        self.request_ids = ()
        super().end_forward()

    def finish_step(self, read_row: ReadRow, write_row: WriteRow) -> Report:
        plan = self._plan
        report = super().finish_step(read_row, write_row)
        for request_id, groups in plan.compress.items() if self.expected else ():
            for index, directive in groups.items():
                what = f"request {request_id}, group {index}:"
                row = read_row(
                    index, request_id, directive.new_shift, directive.end_block
                )
                found, wanted = tuple(row.tolist()), directive.destination
                require(found == wanted, what, "its row has", found, "not", wanted)
        return report


class _Rows:
    """What attention is about to see of one group: around its builder's ``build``.

    Args:
        builder: Of metadata, one of ours.
        compression: Knows what the scheduler expects.
        group: KV cache group.
        block_size: Of the group, kernels may have smaller ones.
    """

    def __init__(
        self, builder: Any, compression: _CheckedExecutor, group: int, block_size: int
    ) -> None:
        self._builder, self._compression = builder, compression
        self._group, self._block_size = group, block_size
        self._build, builder.build = builder.build, self.build

    def build(
        self, prefix: int, common: CommonAttentionMetadata, *args: Any, **kw: Any
    ) -> Any:
        """Build the metadata, and look at what they were built of."""
        found = self._build(prefix, common, *args, **kw)
        if self._compression.expected and self._compression.request_ids:
            shifted = self._builder.row_shift is not None
            physical = self._builder.physical if shifted else common
            self._check_rows(self._compression.expected, common, physical)
        return found

    def _check_rows(
        self,
        expected: Expected,
        common: CommonAttentionMetadata,
        physical: CommonAttentionMetadata,
    ) -> None:
        size = self._block_size
        starts = common.query_start_loc_cpu.tolist()
        logical, held = common.seq_lens.tolist(), physical.seq_lens.tolist()
        table, slots = physical.block_table_tensor, common.slot_mapping.tolist()
        split = size // self._builder.kv_cache_spec.block_size
        for row, request_id in enumerate(self._compression.request_ids):
            what = f"request {request_id}, group {self._group}:"
            shift, blocks = expected.held[request_id][self._group]
            most = expected.computed[request_id] - shift * size
            fits = most - expected.drafts <= held[row] <= most
            require(fits, what, "attention reads", held[row], "tokens, not", most)
            named = kernel_blocks(torch.tensor(blocks, dtype=torch.long), split)
            pages = table[row, : len(named)].tolist()
            for entry, (page, own) in enumerate(
                zip(pages, named.tolist(), strict=True)
            ):
                # Null blocks, behind a sliding window, are not read.
                same = page == own or own < split
                what_row = f"{what} entry {entry} of its row is block"
                require(same, what_row, page // split, "and not", own // split)
            count = starts[row + 1] - starts[row]
            for token, position in enumerate(range(logical[row] - count, logical[row])):
                entry, offset = divmod(position - shift * size, size)
                slot, own = slots[starts[row] + token], blocks[entry] * size + offset
                where = f"{what} token {position} is written to block"
                require(slot == own, where, slot // size, "and not", blocks[entry])


def _derive(thing: Any, mixin: type) -> None:
    """Give an object a class derived from its own."""
    base = type(thing)
    name = f"Checked{base.__name__}"
    bases = (mixin,) if issubclass(mixin, base) else (mixin, base)
    thing.__class__ = type(name, bases, {})


@functools.cache
def _check_selection() -> None:
    """Look at which tokens are kept: the indices are sorted, unique and candidates."""
    select, select_each = executing.select, uneven.select_each

    def checked_select(scores: torch.Tensor, count: int) -> torch.Tensor:
        kept = select(scores, count)
        shape = (len(scores), count)
        require(kept.shape == shape, "kept", tuple(kept.shape), "and not", shape)
        for own in kept:
            _check_kept(own, scores.shape[1])
        return kept

    def checked_select_each(
        scores: torch.Tensor, counts: Sequence[int]
    ) -> list[torch.Tensor]:
        kept = select_each(scores, counts)
        for own, count in zip(kept, counts, strict=True):
            require(len(own) == count, "kept", len(own), "tokens and not", count)
            _check_kept(own, scores.shape[1])
        return kept

    executing.select = checked_select  # type: ignore[assignment]
    uneven.select_each = checked_select_each


def _check_kept(kept: torch.Tensor, candidates: int) -> None:
    sorted_ = bool((kept.diff() > 0).all())
    inside = bool(((kept >= 0) & (kept < candidates)).all())
    require(sorted_ and inside, "kept", kept.tolist(), "of", candidates, "candidates")


@functools.cache
def _worker(name: str) -> type:
    base = getattr(workers, name.replace("Checked", "Compressed", 1))
    derived = type(name, (_CheckedWorker, base), {})
    derived.__module__ = __name__
    return derived


def __getattr__(name: str) -> type:
    """``CheckedCPUWorker`` is derived from ``CompressedCPUWorker``, and so on."""
    if not name.startswith("Checked"):
        raise AttributeError(name)
    return _worker(name)
