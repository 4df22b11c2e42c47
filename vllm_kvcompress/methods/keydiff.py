"""KeyDiff: keep the keys that are unlike the others (arXiv 2504.15364)."""

from typing import ClassVar

import torch
from torch.nn.functional import normalize

from .base import Layer, Scorer


class KeyDiff(Scorer):
    """Minus the cosine of a key with the mean direction of its KV head's keys.

    Over all tokens at once, as kvpress does it; the paper evicts block by block
    while it reads the prompt.
    """

    name: ClassVar[str] = "keydiff"

    def score(
        self,
        queries: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor | None,
        layer: Layer,
    ) -> torch.Tensor:
        """See `Scorer.score`: one KV head at a time, which saves memory."""
        return torch.stack([-_likeness(head) for head in keys])


def _likeness(keys: torch.Tensor) -> torch.Tensor:
    """Cosine of each of ``[tokens, head_size]`` with their mean direction."""
    directions = normalize(keys.float(), dim=-1)
    return directions @ normalize(directions.mean(0), dim=-1)
