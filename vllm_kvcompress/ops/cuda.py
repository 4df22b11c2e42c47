"""Kernels for NVIDIA's GPUs: csrc/cuda, compiled on request (see setup.py).

A call only puts kernels on the current stream of its tensors' device: it never waits
for them, and it may be captured in a CUDA graph. What it allocates is torch's, so it
is reused only by what comes later on that stream.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_int, c_int64, c_void_p
from typing import Any

import torch

from . import native_calls
from .native_calls import Compact
from .pages import Elements
from .providers import Setting

_library = native_calls.load(
    "_cuda", "install again with KVCOMPRESS_BUILD_CUDA=1 where nvcc is"
)


def _check(code: int, *_: Any) -> None:
    if code:
        raise RuntimeError(f"a CUDA kernel was not launched: {_text(code)}")


def _text(code: int) -> str:
    text: bytes = _library.kvc_cuda_text(code)
    return text.decode()


for _name, *_types in (
    ("select", c_void_p, *[c_int64] * 4, c_void_p, c_void_p),
    ("compact", POINTER(Compact), c_int64, c_void_p, c_void_p),
):
    _function = getattr(_library, f"kvc_cuda_{_name}")
    _function.argtypes, _function.restype = tuple(_types), c_int
    _function.errcheck = _check
_library.kvc_cuda_text.argtypes, _library.kvc_cuda_text.restype = (c_int,), c_char_p


@contextmanager
def _stream(device: torch.device) -> Iterator[int]:
    """The handle of a device's current stream; the device is the current one."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


def refusal(setting: Setting, operation: str | None) -> str | None:
    """Why these kernels cannot serve, None if they can."""
    if setting.device.type != "cuda":
        return f"runs on no {setting.device.type}"
    with torch.cuda.device(setting.device):
        if code := _library.kvc_cuda_ready():
            return _text(code)
    if operation == "compact":
        if any(None in (pages.keys, pages.values) for pages in setting.pages):
            return "moves no tokens of tiled pages"
        if sizes := {pages.dtype.itemsize for pages in setting.pages} - {1, 2, 4}:
            return f"moves no elements of {sizes.pop()} bytes"
    return None


def select(scores: torch.Tensor, count: int) -> torch.Tensor:
    """See `select.select`."""
    with _stream(scores.device) as stream:
        return native_calls.select(_library.kvc_cuda_select, scores, count, stream)


def compact(
    cache: torch.Tensor,
    halves: Sequence[Elements],
    source: torch.Tensor,
    kept: torch.Tensor,
    target: torch.Tensor,
) -> None:
    """See `compact.compact`.

    Tokens go through a buffer of their size where target blocks are among the source's,
    which the GPU finds out.
    """
    moved = 2 * kept.numel() * halves[0].head_size * cache.element_size()
    staging = torch.empty(
        native_calls.STAGING_FLAG + moved, dtype=torch.uint8, device=cache.device
    )
    with _stream(cache.device) as stream:
        native_calls.compact(
            _library.kvc_cuda_compact,
            *(cache, halves, source, kept, target),
            *(len(source), staging.data_ptr(), stream),
        )


KERNELS: Mapping[str, Callable[..., Any]] = {"select": select, "compact": compact}
