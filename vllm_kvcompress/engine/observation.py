"""Queries that a coming compression wants to see."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Span = tuple[str, int, int]


@dataclass
class ObservationWindow:
    """Queries of one layer, kept until their request is compressed.

    Attributes:
        spans: ``(request id, first, end)`` of tokens in the current batch; one
            list shared by all layers.
        queries: Request id -> chunks ``[tokens, query_heads, head_size]``.
    """

    spans: list[Span]
    queries: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    _latest: dict[str, Span] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.spans)

    def capture(
        self,
        query: torch.Tensor,
        tokens: np.ndarray | None = None,
        factor: torch.Tensor | float = 1.0,
    ) -> None:
        """Copy the spans out of a batch's queries ``[tokens, heads, head_size]``.

        Where a layer runs twice over the same tokens, the last time counts.

        Args:
            query: The queries.
            tokens: Which tokens of the batch they are, ascending; None = all.
            factor: What queries are multiplied by, where they are codes.
        """
        for span in self.spans:
            request_id, first, end = span
            if tokens is not None:
                first, end = np.searchsorted(tokens, [first, end])
            if first == end:
                continue
            chunks = self.queries.setdefault(request_id, [])
            if chunks and self._latest.get(request_id) is span:
                chunks.pop()
            self._latest[request_id] = span
            own = query[first:end]
            codes = own.dtype.itemsize == 1
            chunks.append(own.float() * factor if codes else own.clone())

    def of(self, request_id: str, count: int) -> torch.Tensor:
        """A request's latest queries, ``[count, query_heads, head_size]``."""
        chunks = self.queries[request_id]
        if len(chunks) > 1:
            chunks[:] = [torch.cat(chunks)]
        return chunks[0][-count:]

    def keep(self, request_id: str, count: int) -> None:
        """Drop all of a request's queries but the latest ones."""
        self._latest.pop(request_id, None)
        if count and request_id in self.queries:
            self.queries[request_id] = [self.of(request_id, count).clone()]
        else:
            self.queries.pop(request_id, None)


def observed(layer: Any, request_id: str, count: int) -> torch.Tensor:
    """The latest queries of all layers that read a layer's KV.

    They count as more query heads of its KV heads.

    Returns:
        ``[count, kv_heads * readers * query heads per KV head, head_size]``.
    """
    readers: Sequence[Any] = getattr(layer, "kv_readers", (layer,))
    found = [each.observation_window.of(request_id, count) for each in readers]
    if len(found) == 1:
        return found[0]
    by_head = [each.unflatten(1, (layer.num_kv_heads, -1)) for each in found]
    return torch.cat(by_head, dim=2).flatten(1, 2)
