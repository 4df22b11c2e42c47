"""Queries that a coming compression wants to see."""

from dataclasses import dataclass, field

import torch


@dataclass
class ObservationWindow:
    """Queries of one layer, kept until their request is compressed.

    Attributes:
        spans: ``(request id, first, end)`` of tokens in the current batch; one
            list shared by all layers.
        queries: Request id -> chunks ``[tokens, query_heads, head_size]``.
    """

    spans: list[tuple[str, int, int]]
    queries: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.spans)

    def capture(self, query: torch.Tensor) -> None:
        """Copy the spans out of a batch's queries ``[tokens, heads, head_size]``."""
        for request_id, first, end in self.spans:
            self.queries.setdefault(request_id, []).append(query[first:end].clone())

    def of(self, request_id: str, count: int) -> torch.Tensor:
        """A request's latest queries, ``[count, query_heads, head_size]``."""
        chunks = self.queries[request_id]
        if len(chunks) > 1:
            chunks[:] = [torch.cat(chunks)]
        return chunks[0][-count:]

    def keep(self, request_id: str, count: int) -> None:
        """Drop all of a request's queries but the latest ones."""
        if count and request_id in self.queries:
            self.queries[request_id] = [self.of(request_id, count).clone()]
        else:
            self.queries.pop(request_id, None)
