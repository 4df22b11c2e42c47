"""Triton's shifted block tables against the meaning, and in a CUDA graph."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm_kvcompress.triton_kernels.row_shift import shift_rows

from tests.kernels.pages import DEVICE
from vllm_kvcompress.ops.row_shift import shift_rows as operation

pytestmark = pytest.mark.usefixtures("small_tiles")


def _table(rows: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(0, 999, (rows, width + 3), generator=generator)
    return table.int().to(DEVICE)[:, :width]


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_rows(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 20))
    block_size = data.draw(st.sampled_from([1, 16, 48]))
    shifts = st.lists(st.integers(0, width + 2), min_size=rows, max_size=rows)
    tokens = torch.tensor(data.draw(shifts), dtype=torch.int32) * block_size
    tokens = tokens.to(DEVICE)
    table = _table(rows, width, seed=width)
    lens = tokens + torch.arange(rows, dtype=torch.int32, device=DEVICE)
    wide = torch.full((2, rows, width + 5), -1, dtype=torch.int32, device=DEVICE)
    lens_out = torch.full((2, rows), -1, dtype=torch.int32, device=DEVICE)
    for shift, out, length in zip(
        (operation.meaning, shift_rows), wide, lens_out, strict=True
    ):
        held = torch.zeros_like(table) - 1
        shift(table, lens, tokens, block_size, table_out=held, lens_out=length)
        out[:, :width] = held
    assert wide[0].equal(wide[1]) and lens_out[0].equal(lens_out[1])


def test_nothing_beside_a_view_is_written() -> None:
    table, out = _table(3, 6, seed=0), torch.full((3, 9), -1, device=DEVICE).int()
    lens, lens_out = torch.full((2, 3), 40, device=DEVICE).int()
    tokens = torch.tensor([0, 16, 32], device=DEVICE).int()
    shift_rows(table, lens, tokens, 16, table_out=out[:, 2:8], lens_out=lens_out)
    assert (out[:, :2] == -1).all() and (out[:, 8:] == -1).all()
    last = table[:, -1]
    assert out[1, 2:8].tolist() == [*table[1, 1:].tolist(), int(last[1])]
    assert out[2, 2:8].tolist() == [*table[2, 2:].tolist(), *[int(last[2])] * 2]
    assert lens_out.tolist() == [40, 24, 8]


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    table, out = _table(64, 4096, seed=0), _table(64, 4096, seed=1).contiguous()
    lens = torch.full((64,), 60_000, device=DEVICE).int()
    tokens, lens_out = torch.zeros_like(lens), torch.zeros_like(lens)
    call = (table, lens, tokens, 16)
    shift_rows(*call, table_out=out, lens_out=lens_out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        shift_rows(*call, table_out=out, lens_out=lens_out)
    tokens.copy_(16 * torch.arange(64))
    expected, lengths = torch.empty_like(out), torch.empty_like(lens)
    operation.meaning(*call, table_out=expected, lens_out=lengths)
    graph.replay()
    assert out.equal(expected) and lens_out.equal(lengths)
