"""Pages with factors, restored to plain ones for a kernel that knows no factors.

That costs a pass over the pages, and memory for those of one request.
"""

import torch

from .layout import Elements, PageLayout


class Restorer:
    """Restored pages of one request at a time, in memory that is used again."""

    def __init__(self) -> None:
        self._pages: torch.Tensor | None = None

    def restore(
        self,
        layout: PageLayout,
        kv_cache: torch.Tensor,
        blocks: torch.Tensor,
        scales: torch.Tensor,
    ) -> torch.Tensor:
        """Multiply keys and values by their factors.

        Args:
            layout: Of the pages.
            kv_cache: ``[num_blocks, kv_heads, block_size, 2 * head_size]``.
            blocks: ``[count]`` int64.
            scales: ``[2, num_blocks, block_size, kv_heads]``.

        Returns:
            ``[count, kv_heads, block_size, 2 * head_size]``, valid until the next call.
        """
        pages = self._room(kv_cache, len(blocks))
        found = scales[:, blocks].transpose(2, 3).to(kv_cache.dtype)
        for half, factors in zip((layout.keys, layout.values), found, strict=True):
            _scale(half, kv_cache, blocks, factors, pages)
        return pages

    def _room(self, kv_cache: torch.Tensor, count: int) -> torch.Tensor:
        if self._pages is None or len(self._pages) < count:
            self._pages = torch.empty(
                (count, *kv_cache.shape[1:]), dtype=kv_cache.dtype
            )
        return self._pages[:count]


def _scale(
    half: Elements,
    kv_cache: torch.Tensor,
    blocks: torch.Tensor,
    factors: torch.Tensor,
    pages: torch.Tensor,
) -> None:
    """Fill one half of ``pages``; factors are ``[count, kv_heads, block_size]``.

    Block by block, so that each is read and written once.
    """
    source, target = half.view(kv_cache), half.view(pages)
    if source is None or target is None:
        tokens = half.take(kv_cache, blocks)
        own = factors.transpose(0, 1).flatten(1)
        half.write(pages, torch.arange(len(blocks)), tokens * own[..., None])
        return
    for index, block in enumerate(blocks.tolist()):
        torch.mul(source[block], factors[index, ..., None], out=target[index])
