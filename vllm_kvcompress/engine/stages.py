"""Pipeline stages: each has some of a model's layers."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group

from ..config import KEY, ConfigError, KVCompressionConfig


def number_layers(
    layers: Sequence[Any], vllm_config: VllmConfig
) -> tuple[dict[int, Any], int]:
    """Number this stage's compressed layers as the whole model's, from the bottom.

    All workers call this at the same time.

    Returns:
        The layers by number, and how many there are on all stages.
    """
    first, total = 0, len(layers)
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        stages = get_pp_group()
        counts = [0] * stages.world_size
        torch.distributed.all_gather_object(counts, total, group=stages.cpu_group)
        first, total = sum(counts[: stages.rank_in_group]), sum(counts)
    return dict(enumerate(layers, first)), total


class StageCounts:
    """What the last stage, which answers for all, must know of the others."""

    # vLLM's own messages between stages have tag 0.
    TAG = 1

    def __init__(self) -> None:
        self._sent: Any = None

    def sum_on_last(self, counts: list[int]) -> list[int]:
        """Add up the stages' counts, on the last one; others do not wait for it.

        All workers call this for the same steps.
        """
        stages = get_pp_group()
        if stages.world_size == 1:
            return counts
        own = torch.tensor(counts)
        if not stages.is_last_rank:
            if self._sent:
                self._sent.wait()
            self._sent = torch.distributed.isend(
                own, stages.last_rank, stages.cpu_group, self.TAG
            )
            return counts
        for rank in stages.ranks[:-1]:
            found = torch.empty_like(own)
            torch.distributed.recv(found, rank, stages.cpu_group, self.TAG)
            own += found
        return own.tolist()


def check_stages(
    config: KVCompressionConfig, layers: dict[int, Any], num_layers: int
) -> None:
    """Look for layers that need one another and lie on different stages.

    Args:
        config: Of compression.
        layers: This stage's, see `number_layers`.
        num_layers: Those of all stages.

    Raises:
        ConfigError: There are some.
    """
    together: Sequence[tuple[int, ...]] = config.pairs(num_layers)
    why, way_out = "merges", "give another start_layer"
    if any(scorer.uneven for scorer in config.scorers.values()):
        together = config.tiers(num_layers)
        why, way_out = "deals out one lot of pages to", "give a smaller layers_per_tier"
    for group in together:
        if 0 < len(layers.keys() & set(group)) < len(group):
            raise ConfigError(
                f"{KEY}: method={config.method} {why} the layers "
                f"{', '.join(map(str, group))}, which lie on different pipeline "
                f"stages; {way_out}, cut the stages elsewhere with "
                "VLLM_PP_LAYER_PARTITION, or use --pipeline-parallel-size 1"
            )
