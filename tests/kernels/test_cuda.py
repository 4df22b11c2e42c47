"""The compiled CUDA kernels on a GPU, against the meaning.

KVCOMPRESS_BUILD_CUDA=1 python setup.py build_ext --inplace compiles them.
"""

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings

from vllm_kvcompress.ops.providers import Setting

from . import cuda_cases
from .cuda_cases import Tokens, check_compact, check_select, tokens_of

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cuda() -> ModuleType:
    """The provider."""
    module = pytest.importorskip("vllm_kvcompress.ops.cuda", exc_type=ImportError)
    assert module.refusal(Setting(torch.device("cuda")), None) is None
    return module


@settings(max_examples=200, deadline=None)
@given(case=cuda_cases.tokens())
def test_compact(cuda: ModuleType, case: Tokens) -> None:
    check_compact(cuda.compact, case, "cuda")


@pytest.mark.parametrize("targets", cuda_cases.TARGETS)
@pytest.mark.parametrize("memory", cuda_cases.MEMORY)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_compact_long(
    cuda: ModuleType, dtype: torch.dtype, memory: str, targets: str
) -> None:
    case = tokens_of(
        dtype,
        kv_heads=8,
        block_size=16,
        head_size=128,
        counts=(500, 131),
        memory=memory,
        targets=targets,
    )
    check_compact(cuda.compact, case, "cuda")


@settings(max_examples=200, deadline=None)
@given(case=cuda_cases.rows(longest=20_000))
def test_select(cuda: ModuleType, case: tuple[torch.Tensor, int]) -> None:
    check_select(cuda.select, *case, "cuda")


@pytest.mark.parametrize("count", [1, 4096, 999_999, 1_000_000])
def test_select_of_a_million(cuda: ModuleType, count: int) -> None:
    scores = torch.randn(2, 1_000_000, generator=torch.Generator().manual_seed(0))
    check_select(cuda.select, scores, count, "cuda")
    check_select(cuda.select, scores.mul(4).round(), count, "cuda")


def test_in_a_graph(cuda: ModuleType) -> None:
    """A captured call moves, when it is replayed, what is there by then."""
    case = tokens_of(
        torch.bfloat16,
        kv_heads=2,
        block_size=16,
        head_size=128,
        counts=(40, 20),
        targets="own first",
    )
    scores = torch.empty(2, 40 * 16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    cache = torch.empty(case.shape, dtype=case.dtype, device="cuda")
    source, target = case.source.cuda(), case.target.cuda()
    with torch.cuda.graph(graph):
        kept = cuda.select(scores, 20 * 16)
        cuda.compact(cache, case.halves, source, kept, target)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(scores.shape, generator=generator)
        now = tokens_of(
            torch.bfloat16,
            kv_heads=2,
            block_size=16,
            head_size=128,
            counts=(40, 20),
            targets="own first",
            seed=seed,
        )
        scores.copy_(drawn)
        source.copy_(now.source)
        target.copy_(now.target)
        cache.view(torch.uint8).copy_(now.storage.view(cache.view(torch.uint8).shape))
        graph.replay()
        assert kept.cpu().equal(cuda_cases.select.meaning(drawn, 20 * 16))
        expected = now.storage.clone()
        held = expected.view(now.dtype).view(now.shape)
        cuda_cases.compact.meaning(held, now.halves, now.source, kept.cpu(), now.target)
        assert cache.cpu().view(torch.uint8).flatten().equal(expected)


def test_waits_for_the_current_stream_only(cuda: ModuleType) -> None:
    """What comes before on the stream is seen, and the call does not wait for it."""
    side = torch.cuda.Stream()
    scores = torch.randn(4, 50_000, generator=torch.Generator().manual_seed(0))
    held = scores.cuda()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        found = cuda.select(held.neg(), 1000)
        assert not side.query()
    side.synchronize()
    assert found.cpu().equal(cuda_cases.select.meaning(-scores, 1000))
