"""Ada-SnapKV: SnapKV with more tokens for heads that need them (arXiv 2407.11550)."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from ..ops.head_shares import head_shares
from .snapkv import SnapKV


class AdaSnapKV(SnapKV):
    """SnapKV's scores, but a layer's budget is dealt out between its KV heads.

    Each head is due ``floor`` times the even share, and the rest by its number of
    tokens among the layer's best (algorithm 1 and the safeguard of section 3.4, as
    the authors' code mixes the two). Different here: shares are whole blocks, and
    layers of one tier have the same shares, so ``layers_per_tier: 1`` is the paper.
    """

    name: ClassVar[str] = "ada_snapkv"

    floor: float = Field(
        0.2, ge=0, le=1, description="Part dealt out evenly; 1 = snapkv."
    )

    @property
    def layered(self) -> bool:
        return True

    @property
    def uneven(self) -> bool:
        return True

    def head_shares(
        self, scores: Sequence[torch.Tensor], pages: int, page_size: int
    ) -> list[int]:
        """See `Scorer.head_shares`."""
        return head_shares(scores, pages, page_size, self.floor)
