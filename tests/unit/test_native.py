"""The C++ kernel against the meaning of `attend`, over pages like the CPU's."""

import pytest
import torch

from vllm_kvcompress.ops.attend import attend
from vllm_kvcompress.ops.native import attend_pages

KV_HEADS = 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("block_size", "head_size"), [(32, 64), (128, 80)])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_rows_of_any_length(
    dtype: torch.dtype, group: int, block_size: int, head_size: int, softcap: float
) -> None:
    kernel = attend_pages()
    assert kernel is not None, "a compiler is part of the set-up"
    generator = torch.Generator().manual_seed(0)
    lens = [1, block_size - 1, block_size, 7 * block_size + 5]
    counts = [-(-n // block_size) for n in lens]
    num_blocks = 2 * sum(counts)
    keys, values = (
        torch.randn(
            num_blocks, KV_HEADS, block_size, head_size, generator=generator
        ).to(dtype)
        for _ in range(2)
    )
    pages = torch.cat([keys.transpose(2, 3).flatten(2), values.flatten(2)], 2)
    cache = pages.view(num_blocks, KV_HEADS, block_size, 2 * head_size)
    scales = torch.rand(2, num_blocks, block_size, KV_HEADS, generator=generator)
    scales = scales.to(torch.float16 if dtype == torch.bfloat16 else torch.float32)
    # What no token has been written to may be anything.
    blocks = torch.randperm(num_blocks, generator=generator)[: sum(counts)]
    own = blocks.split(counts)
    query = torch.randn(len(lens), KV_HEADS * group, head_size, generator=generator)
    starts = torch.tensor([0, *counts]).cumsum(0)
    found = kernel(
        query, cache, blocks, starts, torch.tensor(lens), scales, 0.1, softcap
    )
    for row, (mine, length) in enumerate(zip(own, lens, strict=True)):
        held = [
            x[mine].transpose(0, 1).flatten(1, 2)[:, :length] for x in (keys, values)
        ]
        factors = scales[:, mine].permute(0, 3, 1, 2).flatten(2)[:, :, :length]
        expected = attend(
            query[row : row + 1], *held, *factors, scale=0.1, softcap=softcap
        )
        torch.testing.assert_close(found[row : row + 1], expected)


def test_no_compiler_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch.utils import cpp_extension

    def load(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no g++ here")

    monkeypatch.setattr(cpp_extension, "load", load)
    with caplog.at_level("WARNING", logger="vllm.plugins.kv_compression"):
        assert attend_pages.__wrapped__() is None
