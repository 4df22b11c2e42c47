"""The CUDA kernels, their launches and provider on the host, against the meaning.

g++ compiles csrc/cuda/kernels.cu with cuda_on_host.h, where a block's threads are the
host's. With sanitizers (``thread`` is the other one):

    CXXFLAGS=-fsanitize=address,undefined ASAN_OPTIONS=detect_leaks=0 \
        LD_PRELOAD=$(g++ -print-file-name=libasan.so) \
        .venv/bin/pytest tests/kernels/test_cuda_on_host.py
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings

from vllm_kvcompress.ops import native_calls
from vllm_kvcompress.ops.providers import Pages, Setting

from . import cuda_cases
from .cuda_cases import Tokens, check_compact, check_select, tokens_of

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The provider, with its library compiled for the host."""
    library = tmp_path_factory.mktemp("cuda") / "library.so"
    command = ["g++", "-std=c++20", "-O1", "-g", "-pthread", "-shared", "-fPIC"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    # A GPU loads no vector from an address that it does not divide.
    command += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    command += ["-fno-strict-aliasing", *os.environ.get("CXXFLAGS", "").split()]
    command += ["-DKVC_THREADS=64", "-DKVC_MOVE_THREADS=32"]
    command += ["-include", str(Path(__file__).with_name("cuda_on_host.h"))]
    command += ["-x", "c++", str(ROOT / "csrc/cuda/kernels.cu"), "-o", str(library)]
    subprocess.run(command, check=True)
    spec = find_spec("vllm_kvcompress.ops.cuda")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_calls, "load", lambda *_: ctypes.CDLL(str(library)))
        spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_stream", lambda device: nullcontext(None))
        yield module


@settings(max_examples=200, deadline=None)
@given(case=cuda_cases.tokens())
def test_compact(cuda: ModuleType, case: Tokens) -> None:
    check_compact(cuda.compact, case, "cpu")


@pytest.mark.parametrize("targets", cuda_cases.TARGETS)
def test_compact_many_tiles(cuda: ModuleType, targets: str) -> None:
    case = tokens_of(
        torch.bfloat16,
        kv_heads=2,
        block_size=16,
        head_size=128,
        counts=(9, 7),
        targets=targets,
    )
    check_compact(cuda.compact, case, "cpu")


def test_compact_straight_where_blocks_are_known_to_be_apart(cuda: ModuleType) -> None:
    case = tokens_of(
        torch.bfloat16, kv_heads=2, block_size=16, head_size=8, counts=(4, 3)
    )

    def straight(cache: torch.Tensor, halves, *numbers: torch.Tensor) -> None:
        function = cuda._library.kvc_cuda_compact
        native_calls.compact(function, cache, halves, *numbers, 0, None, None)

    check_compact(straight, case, "cpu")


def test_block_numbers_that_share_a_bit(cuda: ModuleType) -> None:
    """An overlap that is none goes through the staging buffer, to the same end."""
    far = 1 << 18
    cache = torch.arange(2 * (far + 1), dtype=torch.float32).view(far + 1, 1, 1, 2)
    halves = cuda_cases._halves("rows", 1, 1)
    before = cache[far].clone()
    numbers = (torch.tensor(x) for x in ([far], [[0]], [0]))
    cuda.compact(cache, halves, *numbers)
    assert cache[0].equal(before) and cache[far].equal(before)


@settings(max_examples=60, deadline=None)
@given(case=cuda_cases.rows(longest=40))
def test_select_short_rows(cuda: ModuleType, case: tuple[torch.Tensor, int]) -> None:
    check_select(cuda.select, *case, "cpu")


@settings(max_examples=20, deadline=None)
@given(case=cuda_cases.rows(longest=3000))
def test_select_long_rows(cuda: ModuleType, case: tuple[torch.Tensor, int]) -> None:
    check_select(cuda.select, *case, "cpu")


def test_select_by_the_last_digit(cuda: ModuleType) -> None:
    """Scores that differ in one bit, each of all."""
    bits = torch.cat([torch.tensor([0]), 1 << torch.arange(31)]).int()
    scores = torch.cat([bits, bits | -(1 << 31)]).view(torch.float32)[None]
    for count in (1, 31, 32, 33, 63):
        check_select(cuda.select, scores, count, "cpu")


def test_select_turned_rows(cuda: ModuleType) -> None:
    scores = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).T
    check_select(cuda.select, scores, 20, "cpu")


def test_refusals(cuda: ModuleType) -> None:
    tiled = Setting(
        torch.device("cuda"), frozenset({Pages(torch.bfloat16, 16, 64, None, None)})
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device", nullcontext)
        assert cuda.refusal(tiled, None) is None
        assert cuda.refusal(tiled, "select") is None
        assert cuda.refusal(tiled, "compact") == "moves no tokens of tiled pages"
    assert cuda.refusal(Setting(torch.device("cpu")), None) == "runs on no cpu"


def test_no_library_is_a_reason() -> None:
    with pytest.raises(ImportError, match="was not compiled; take a compiler"):
        native_calls.load("_none", "take a compiler")
