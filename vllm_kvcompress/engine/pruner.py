"""Takes prompt tokens out of a batch between two tiers of layers, while a model runs.

What leaves is not computed by the layers above and gets no KV there. Runner, model
and kernels are vLLM's: hooks on the decoder layers shorten what goes from one to the
next, and the tiers above get attention metadata of their own. Steps that prune
nothing run without hooks, compiled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.interfaces import supports_multimodal

from ..config import KEY, ConfigError
from ..methods.base import Scorer
from ..ops.select import select
from ..plan import Compress, StepPlan
from .heads import rate
from .layout import kernel_blocks
from .page_formats import KEYS, pages_of


@dataclass
class _Row:
    """One request in the batch.

    Attributes:
        request_id: Its id.
        tokens: Tokens that came with it, before any left.
        kept: Which of them are still there, ``[count]`` int64, ascending.
    """

    request_id: str
    tokens: int
    kept: torch.Tensor


@dataclass
class Tier:
    """Layers that see the same tokens.

    Attributes:
        group: Their KV cache group.
        block_size: Tokens of a block of that group.
        builder: Of their attention metadata; it counts blocks of its own size.
        layers: Their attention.
        table: Rows of their block table in this step, as kernels read them.
    """

    group: int
    block_size: int
    builder: Any
    layers: list[Any]
    table: torch.Tensor | None = None


class Pruner:
    """Hooks of one model runner."""

    def __init__(
        self, model: nn.Module, tiers: Sequence[Tier], scorers: Mapping[str, Scorer]
    ) -> None:
        """Find the decoder layers of a loaded model.

        Args:
            model: vLLM's.
            tiers: From the lowest to the highest.
            scorers: By name.

        Raises:
            ConfigError: Some layers are in no tier, such as those of a sliding window.
        """
        self._model, self._tiers, self._scorers = model, tiers, scorers
        tier_of = {id(a): number for number, t in enumerate(tiers) for a in t.layers}
        self._tier_of: dict[nn.Module, int] = {}
        for module in model.modules():
            attention = getattr(getattr(module, "self_attn", None), "attn", None)
            if not isinstance(attention, Attention):  # an image tower's has no KV
                continue
            if id(attention) not in tier_of:
                raise ConfigError(
                    f"{KEY}: not every layer of this model can be compressed, so none "
                    "can be pruned; add prune=false, which drops KV only"
                )
            self._tier_of[module] = tier_of[id(attention)]
        # Such a model may add images between layers, to all of the batch.
        self._widens = supports_multimodal(model)
        self._handles: list[Any] = []

    def begin(
        self,
        plan: StepPlan,
        request_ids: Sequence[str],
        counts: Sequence[int],
        spans: list[tuple[str, int, int]],
    ) -> None:
        """Hook into the coming forward, if its plan prunes.

        Args:
            plan: The step's.
            request_ids: Requests in the order of the batch's rows.
            counts: Tokens of each row.
            spans: Observation windows in the batch; kept up to date.
        """
        directives = [d for groups in plan.compress.values() for d in groups.values()]
        if not any(directive.pruned for directive in directives):
            return
        self._plan, self._spans = plan, spans
        self._rows = [
            _Row(request_id, int(count), torch.arange(int(count)))
            for request_id, count in zip(request_ids, counts, strict=True)
        ]
        layers = [*self._tier_of]
        restored = layers if self._widens else layers[-1:]
        self._handles = [
            self._model.register_forward_pre_hook(_run_uncompiled),
            *(layer.register_forward_pre_hook(self._enter) for layer in layers),
            *(layer.register_forward_hook(self._restore) for layer in restored),
        ]

    def end(self) -> None:
        """Leave no hook behind, nor anything of the step."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._plan, self._rows = StepPlan(), []

    def _enter(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give a decoder layer what is left of the batch."""
        positions, hidden, residual = args
        tier = self._tier_of[layer]
        if residual is None:  # the lowest layer
            self._padded, self._at = len(hidden), 0
            self._left = torch.arange(len(hidden), device=hidden.device)
            self._tiers[0].table = self._tiers[0].builder.physical.block_table_tensor
        elif self._widens:
            hidden, residual = hidden[self._left], residual[self._left]
        if tier > self._at:
            self._at = tier
            places = self._prune(self._tiers[tier - 1], self._tiers[tier])
            places = places.to(hidden.device)
            hidden, residual = hidden[places], residual[places]
            self._left = self._left[places]
        return positions[..., self._left], hidden, residual

    def _restore(self, layer: nn.Module, args: Any, output: tuple[Any, ...]) -> Any:
        """Bring what is left back to its places; who left has no hidden state."""
        return tuple(
            states.new_zeros(self._padded, states.shape[1]).index_copy_(
                0, self._left, states
            )
            for states in output
        )

    def _prune(self, below: Tier, tier: Tier) -> torch.Tensor:
        """Choose what enters a tier; returns its places among what was there."""
        whole = tier.builder.physical
        size = tier.builder.kv_cache_spec.block_size
        tier.table = whole.block_table_tensor.clone()
        came = [row.tokens for row in self._rows]
        slots = list(whole.slot_mapping[: sum(came)].split(came))
        places, first = [], 0
        for number, row in enumerate(self._rows):
            count = len(row.kept)
            chosen = torch.arange(count)
            do = self._plan.compress.get(row.request_id, {}).get(tier.group)
            if do is not None and do.pruned:
                blocks = self._blocks(do, tier, tier.table[number])
                chosen = self._choose(do, below, row, number)
                row.kept = row.kept[chosen]
                tier.table[number, : len(blocks)] = blocks
                place = torch.arange(len(chosen), device=blocks.device)
                slots[number] = blocks[place // size] * size + place % size
            places.append(first + chosen)
            first += count
        self._announce(tier, torch.cat([s.to(whole.slot_mapping.dtype) for s in slots]))
        return torch.cat(places)

    def _blocks(self, do: Compress, tier: Tier, row: torch.Tensor) -> torch.Tensor:
        """Kernel blocks that a row's tokens fill from the first one on."""
        split = tier.block_size // tier.builder.kv_cache_spec.block_size
        private = torch.tensor(do.destination, dtype=row.dtype, device=row.device)
        tail = row[do.end_block * split : -(-do.num_tokens // tier.block_size) * split]
        return torch.cat([kernel_blocks(private, split).to(row.dtype), tail])

    def _choose(
        self, do: Compress, below: Tier, row: _Row, number: int
    ) -> torch.Tensor:
        """Which of a row's tokens enter, by the attention of the layer below."""
        attention = below.layers[-1]
        cache, count = attention.kv_cache, len(row.kept)
        assert below.table is not None
        blocks = below.table[number, : -(-count // cache.shape[2])].long()
        scores = rate(
            self._scorers[do.scorer],
            attention,
            attention.observation_window.of(row.request_id, do.window),
            pages_of(attention).vectors(KEYS, blocks.expand(cache.shape[1], -1), count),
            None,
        )
        candidates = count - do.num_tokens % below.block_size
        private = len(do.destination) * below.block_size
        kept = select(scores[:1, :candidates], private)[0].cpu()
        return torch.cat([kept, torch.arange(candidates, count)])

    def _announce(self, tier: Tier, slots: torch.Tensor) -> None:
        """Tell a tier's attention, and the observation windows, who is left."""
        whole = tier.builder.physical
        lost = torch.zeros(whole.num_reqs, dtype=torch.int32)
        counts = torch.zeros(whole.num_reqs + 1, dtype=torch.int32)
        for number, row in enumerate(self._rows):
            counts[number + 1] = len(row.kept)
            lost[number] = row.tokens - len(row.kept)
        starts = counts.cumsum(0, dtype=torch.int32)
        device = whole.seq_lens.device
        bound = whole.seq_lens_cpu_upper_bound
        metadata = tier.builder.build_physical(
            whole.replace(
                query_start_loc=starts.to(device),
                query_start_loc_cpu=starts,
                seq_lens=whole.seq_lens - lost.to(device),
                seq_lens_cpu_upper_bound=None if bound is None else bound - lost,
                num_actual_tokens=int(starts[-1]),
                max_query_len=int(counts.max()),
                block_table_tensor=tier.table,
                slot_mapping=slots,
                positions=None,
                _num_computed_tokens_cache=None,
            )
        )
        context: Any = get_forward_context()
        for attention in tier.layers:
            context.attn_metadata[attention.layer_name] = metadata
            context.slot_mapping[attention.layer_name] = slots
        self._spans.clear()
        for number, row in enumerate(self._rows):
            if span := self._plan.observe.get(row.request_id):
                origin = int(starts[number] - lost[number])
                self._spans.append((row.request_id, origin + span[0], origin + span[1]))


def _run_uncompiled(model: nn.Module, args: Any) -> None:
    """A compiled graph has one length from end to end."""
    get_forward_context().skip_compiled = True
