"""KV heads under tensor parallelism: who holds which, and what must be known of all.

Each worker scores the heads that it holds. Where a decision hangs on all heads of a
layer, the workers of a tensor-parallel group exchange what it needs; the scheduler's
plan has them do so in one order. With fewer KV heads than workers each head is held by
several, and their query heads are shared out among these.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.models.utils import extract_layer_index

from ..methods.base import Layer, Scorer
from ..ops.pages import PagedKeys


@dataclass(frozen=True)
class HeldHeads:
    """A worker's part of a layer's KV heads.

    Attributes:
        count: Heads that it holds.
        workers: Of the tensor-parallel group.
        rank: Which of them it is.
        copies: Workers that hold the same head.
    """

    count: int
    workers: int = 1
    rank: int = 0
    copies: int = 1

    @property
    def first(self) -> int:
        """Number of its first head among all of the layer's."""
        return self.rank // self.copies * self.count

    @property
    def total(self) -> int:
        """Heads of the layer."""
        return self.count * self.workers // self.copies

    def queries(self, queries: torch.Tensor) -> torch.Tensor:
        """``[tokens, query_heads, head_size]``: those of its head on all workers."""
        if self.copies == 1 or not len(queries):
            return queries
        found = tensor_model_parallel_all_gather(queries.contiguous(), dim=1)
        return found.chunk(self.total, dim=1)[self.first]

    def mean(self, scores: torch.Tensor) -> torch.Tensor:
        """Of scores that are alike for all of its heads the mean over all workers."""
        if self.workers == 1:
            return scores
        mean = tensor_model_parallel_all_reduce(scores[0].contiguous()) / self.workers
        return mean.expand_as(scores)

    def all_scores(
        self, scores: Sequence[torch.Tensor], longest: int
    ) -> list[torch.Tensor]:
        """The scores of all heads of some layers.

        Args:
            scores: Of each layer, ``[count, tokens]``.
            longest: Most tokens that a head holds, on any worker.

        Returns:
            Of each layer, ``[total, longest]``, -inf behind a head's own.
        """
        if self.workers == 1:
            return list(scores)
        own = torch.stack(list(scores))
        own = pad(own, (0, longest - own.shape[2]), value=float("-inf"))
        found = tensor_model_parallel_all_gather(own, dim=1)
        found = found.unflatten(1, (self.workers, -1))[:, :: self.copies]
        return list(found.flatten(1, 2))

    def most(self, shares: Sequence[int]) -> int:
        """The largest sum of what its ``total`` heads' shares are on one worker."""
        firsts = range(0, self.total, self.count)
        return max(sum(shares[first : first + self.count]) for first in firsts)


def held_heads(layer: Any, vllm_config: VllmConfig) -> HeldHeads:
    """Which of a layer's KV heads this worker holds."""
    workers = vllm_config.parallel_config.tensor_parallel_size
    count = layer.num_kv_heads
    if workers == 1:
        return HeldHeads(count)
    shapes = vllm_config.model_config.model_arch_config
    total = shapes[extract_layer_index(layer.layer_name)].total_num_kv_heads
    copies = max(1, workers // total) if count == 1 else 1
    return HeldHeads(count, workers, get_tensor_model_parallel_rank(), copies)


def rate(
    scorer: Scorer,
    layer: Any,
    queries: torch.Tensor | None,
    keys: torch.Tensor | PagedKeys,
    values: torch.Tensor | None,
    *,
    head: int = 0,
) -> torch.Tensor:
    """The scores of a compressed layer's tokens, see `Scorer.score`.

    All workers of a tensor-parallel group call it at the same time.

    Args:
        scorer: Of a method.
        layer: vLLM's; the rest is what is given to the scorer, of
        queries: those of this worker,
        keys: some of its heads,
        values: or all of them, from
        head: this one on.
    """
    heads: HeldHeads = layer.held_heads
    softcap = getattr(layer.impl, "logits_soft_cap", None) or 0.0
    readers = getattr(layer, "kv_readers", (layer,))
    past_only = [getattr(each, "leaves_out_current", False) for each in readers]
    group = layer.num_heads // layer.num_kv_heads
    flags = [flag for flag in past_only for _ in range(group) if any(past_only)]
    about = Layer(
        layer.compressed_index,
        layer.impl.scale,
        softcap,
        tuple(flags) * heads.copies,
        heads.first + head,
    )
    if queries is not None:
        queries = heads.queries(queries)
    if isinstance(keys, PagedKeys) and not scorer.takes_pages:
        keys = keys.dense()
    scores = scorer.score(queries, keys, values, about)
    return heads.mean(scores) if scorer.across_heads else scores
