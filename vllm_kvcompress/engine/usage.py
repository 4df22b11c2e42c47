"""What a request that asks is told of its own compression.

It travels with each of its outputs, where vLLM has room for KV connectors' words:
whoever sees the last one, sees the whole. A request knows one life only: what it has
lost before a preemption, it has lost again since.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.request import Request

from ..config import KEY
from ..plan import Compress
from .manager import CompressedKVManager


@dataclass
class Usage:
    """One request's compressions since it was last admitted.

    Attributes:
        request: It asked.
        method: What it is to be compressed with, None = it is to stay as it is.
        skipped: Why nothing comes of it, None = something does.
        compressions: How often, once per KV cache group.
        blocks_freed: Given back to the pool.
        evicted: KV cache group -> blocks of tokens that are gone.
        overflow: The same of those that are held beyond the mean of all KV heads.
        waited: Steps in which some of it waited for private blocks, of all lives: what
            they generated stays.
    """

    request: Request
    method: str | None
    skipped: str | None
    compressions: int = 0
    blocks_freed: int = 0
    evicted: dict[int, int] = field(default_factory=dict)
    overflow: dict[int, int] = field(default_factory=dict)
    waited: int = 0

    def add(self, planned: Mapping[int, Compress], dry: bool) -> None:
        """Count a step's compressions; ``dry`` if others wait for private blocks."""
        self.skipped = "pool_dry" if dry else None
        self.waited += dry
        self.compressions += len(planned)
        for group, directive in planned.items():
            self.blocks_freed += directive.freed_blocks
            self.evicted[group] = directive.new_shift

    def settle(self, group: int, overflow: int) -> None:
        """Learn what a group's heads need beyond their mean."""
        self.blocks_freed += self.overflow.get(group, 0) - overflow
        self.overflow[group] = overflow

    def report(self, managers: Mapping[int, CompressedKVManager]) -> dict[str, Any]:
        """The same in words of JSON."""
        logical = self.request.num_tokens - 1  # nobody has read the last one yet
        retained = {
            group: logical - self.evicted.get(group, 0) * manager.block_size
            for group, manager in managers.items()
        }
        tiers = {managers[group].kv_cache_spec.tier: n for group, n in retained.items()}
        by_layer = sorted((layer, n) for tier, n in tiers.items() for layer in tier)
        return {
            "method": self.method,
            "skipped": self.skipped,
            "waited": self.waited,
            "compressions": self.compressions,
            "blocks_freed": self.blocks_freed,
            "logical_tokens": logical,
            "retained_tokens": round(fmean(retained.values())),
            "retained_by_layer": [n for _, n in by_layer] if len(tiers) > 1 else None,
        }


def attach(
    messages: Iterable[EngineCoreOutputs],
    usages: Mapping[str, Usage],
    managers: Mapping[int, CompressedKVManager],
) -> None:
    """Tell those who asked."""
    for message in messages:
        for output in message.outputs:
            if usage := usages.get(output.request_id):
                others = output.kv_transfer_params or {}
                told = {KEY: usage.report(managers)}
                output.kv_transfer_params = {**others, **told}
