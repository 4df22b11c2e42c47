"""Backends as for layers of one KV head: layout, CUDA graphs, metadata."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.test_refusals import _config, model  # noqa: F401
from vllm_kvcompress.config import ConfigError

pytestmark = pytest.mark.vllm
HEADS, BLOCK = 2, 32


def _derived(name: str) -> Any:
    from vllm_kvcompress.engine import backend

    return getattr(backend, f"Compressed_{name}")


@pytest.mark.parametrize("name", ["CPU_ATTN", "TRITON_ATTN", "FLASH_ATTN"])
def test_builders_of_one_head(name: str, model: Path) -> None:  # noqa: F811
    """Built by vLLM, on the CPU, from a batch of three requests."""
    from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vllm_kvcompress.engine.head_pages import HeadPages
    from vllm_kvcompress.engine.one_head import LAYOUT, head_major

    backend = head_major(_derived(name))
    assert backend.get_name() == name
    assert backend.supported_kv_cache_layouts() == (LAYOUT,)
    config = _config(model)
    spec = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=HEADS, head_size=32, dtype=torch.float32
    )
    builder_cls: Any = backend.get_builder_cls()
    support = builder_cls.get_cudagraph_support(config, spec)
    assert support == AttentionCGSupport.NEVER
    builder = builder_cls(spec, [], config, torch.device("cpu"))
    rows = HeadPages(8, torch.device("cpu"), HEADS)
    builder.row_shift = rows
    rows.set("b", 4 * BLOCK)
    rows.deal("b", torch.tensor([5, 6]), [1, 3], mean=2, most=3)
    rows.begin(["a", "b", "c"])
    lens = torch.tensor([10, 230, 40], dtype=torch.int32)
    starts = torch.tensor([0, 1, 2, 12], dtype=torch.int32)
    table = torch.arange(3 * 8, dtype=torch.int32).view(3, 8)
    table[1, 4:6] = torch.tensor([5, 6])
    metadata = builder.build(
        0,
        CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lens,
            seq_lens_cpu_upper_bound=lens,
            num_reqs=3,
            num_actual_tokens=12,
            max_query_len=10,
            max_seq_len=230,
            block_table_tensor=table,
            slot_mapping=torch.zeros(12, dtype=torch.int64),
        ),
    )
    assert metadata.kv_heads == HEADS
    assert metadata.num_actual_tokens == HEADS * 12
    # 230 tokens without 4 blocks; one head has a page less than two, one more.
    assert metadata.seq_lens.tolist() == [10, 70, 40, 10, 134, 40]
    assert metadata.max_seq_len == 134
    assert metadata.query_start_loc.tolist() == [0, 1, 2, 12, 13, 14, 24]
    # Head by head the pages of blocks 5 and 6, then those of the blocks behind them.
    assert metadata.block_table[1, :3].tolist() == [10, 28, 30]
    assert metadata.block_table[4, :5].tolist() == [11, 12, 13, 29, 31]
    assert metadata.block_table[3, :2].tolist() == [1, 3]
    if name == "TRITON_ATTN":
        scratch, whole = metadata.softmax_segm_output, builder.softmax_segm_output
        assert scratch.shape[0] == HEADS * whole.shape[0]
        assert scratch.shape[1] == whole.shape[1] // HEADS
        assert metadata.seq_threshold_3D == HEADS * builder.seq_threshold_3D


@pytest.mark.parametrize(
    ("cache", "fits"),
    [
        (torch.zeros(6, HEADS, BLOCK, 8), True),
        (torch.zeros(6, BLOCK, HEADS, 8).transpose(1, 2), False),
        (torch.zeros(6, HEADS + 1, BLOCK, 8)[:, :HEADS], False),
    ],
    ids=["head by head", "token by token", "padded"],
)
def test_pages_must_be_an_array(cache: torch.Tensor, fits: bool) -> None:
    from vllm_kvcompress.engine.one_head import check_pages, one_head

    if fits:
        check_pages(cache)
        assert one_head(cache).shape == (12, 1, BLOCK, 8)
        assert one_head(cache)[7].data_ptr() == cache[3, 1].data_ptr()
        return
    with pytest.raises(ConfigError, match="choose another method"):
        check_pages(cache)
