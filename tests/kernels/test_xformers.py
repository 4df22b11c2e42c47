"""The xformers provider: on processors its masks and pages, on GPUs all of it."""

import dataclasses
from typing import Any

import pytest
import torch

from tests.kernels.pages import requests
from vllm_kvcompress.ops import attend_pages as attention
from vllm_kvcompress.ops.providers import Setting

pytest.importorskip("xformers")
from vllm_kvcompress.ops import xformers as provider  # noqa: E402


def _by_mask(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    *,
    scale: float,
    output_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """xformers' own meaning of its mask; it has no such kernel for processors."""
    query, key, value = (x[0].float().permute(1, 2, 0, 3) for x in (query, key, value))
    logits = query @ key.transpose(2, 3) * scale
    tables = mask.block_tables.clone()
    # Entries that fill a row up would hide its own page 0 here.
    for own, end in zip(tables, mask.k_seqinfo.seqlen_py, strict=True):
        own[-(-end // mask.page_size) :] = key.shape[2] // mask.page_size
    mask = dataclasses.replace(mask, block_tables=tables)
    seen = mask.materialize((query.shape[2], tables.numel() * mask.page_size))
    seen = seen[..., : logits.shape[-1]]
    logits[..., : seen.shape[-1]] += seen
    logits[..., seen.shape[-1] :] = float("-inf")
    value = value.nan_to_num()  # of slots that hold nothing
    found = logits.nan_to_num(nan=float("-inf")).softmax(-1) @ value
    lse = logits.nan_to_num(nan=float("-inf")).logsumexp(-1)
    return found.permute(2, 0, 1, 3)[None].to(output_dtype), lse[None]


def _merge(
    found: list[torch.Tensor], sums: list[torch.Tensor], write_lse: bool
) -> tuple[torch.Tensor, None]:
    """The formula in the docstring of xformers' `merge_attentions`."""
    weights = torch.stack(sums).softmax(0).transpose(2, 3)[..., None]
    return (torch.stack(found) * weights).sum(0), None


@pytest.mark.parametrize("which", ["none", "some", "all"])
@pytest.mark.parametrize("group", [1, 4])
def test_both_regions(monkeypatch: pytest.MonkeyPatch, which: str, group: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        fmha = provider.fmha
        monkeypatch.setattr(fmha, "memory_efficient_attention_partial", _by_mask)
        monkeypatch.setattr(fmha, "merge_attentions", _merge)
    lens = [1, 16, 33, 64]
    drawn = requests("heads innermost", torch.bfloat16, 16, 64, 2, lens, seed=0)
    generator = torch.Generator().manual_seed(0)
    factors = torch.ones(2, len(drawn.cache), 16, 2)
    scaled = {"none": [], "some": [1, 3, 5], "all": list(range(len(drawn.blocks)))}
    chosen = drawn.blocks[scaled[which]]
    factors[:, chosen] = torch.rand(2, len(chosen), 16, 2, generator=generator) + 0.5
    factors = factors.bfloat16().float()  # so are restored pages
    query = torch.randn(4, 2 * group, 64, generator=generator).bfloat16()
    arguments = [
        query,
        drawn.cache,
        drawn.halves,
        drawn.blocks,
        drawn.starts,
        torch.tensor(lens),
        factors,
    ]
    expected = attention.attend_pages.meaning(*arguments, scale=0.2)
    moved = [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments]
    found = provider.attend_pages(*moved, scale=0.2).cpu()
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_what_is_refused() -> None:
    assert provider.refusal(Setting(torch.device("cpu")), None) == "needs a GPU"
    with pytest.raises(ValueError, match="soft cap"):
        provider.attend_pages(*[torch.ones(1)] * 7, scale=1.0, softcap=2.0)
