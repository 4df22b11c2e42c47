"""What vLLM's quantised KV caches make of vectors, in plain torch."""

from collections.abc import Callable

import torch

Tensor = torch.Tensor
# Vectors, their layer, and whether they are keys (0) or values (1).
Stored = Callable[[Tensor, int, int], Tensor]


def _rounded(x: Tensor) -> Tensor:
    """The nearest whole number, halves away from zero."""
    return x.sign() * (x.abs() + 0.5).floor()


def fp8(x: Tensor, scale: float = 1.0) -> Tensor:
    """The nearest 8-bit floats (e4m3) with one scale for all."""
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def fp8_cut(x: Tensor, scale: float = 1.0) -> Tensor:
    """The same towards zero: vLLM's writer for processors cuts digits off."""
    codes = (x / scale).to(torch.float8_e4m3fn)
    far = codes.float().abs() > (x / scale).abs()
    cut = (codes.view(torch.uint8) - far.byte()).view(torch.float8_e4m3fn)
    return cut.float() * scale


def int8_per_token_head(x: Tensor) -> Tensor:
    """Whole numbers up to 127 with a scale per vector, ``[..., head_size]``."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return _rounded(x / scale) * scale


def fp8_per_token_head(x: Tensor) -> Tensor:
    """8-bit floats with a scale per vector."""
    scale = x.abs().amax(-1, keepdim=True) / 448
    return fp8(x / scale) * scale


def int4_per_token_head(x: Tensor) -> Tensor:
    """Sixteen even steps per rotated vector, one of which is zero."""
    from vllm.v1.attention.ops.int4_per_token_head import single_rht

    turned = single_rht(x.contiguous())
    low = turned.amin(-1, keepdim=True)
    scale = (turned.amax(-1, keepdim=True) - low) / 15
    zero = _rounded(-low / scale).clamp(0, 15)
    codes = _rounded(turned / scale + zero).clamp(0, 15)
    return single_rht((codes - zero) * scale, inverse=True) / x.shape[-1]


_ALL = (fp8, int8_per_token_head, fp8_per_token_head, int4_per_token_head)
FORMATS: dict[str, Stored] = {"auto": lambda x, *_: x}
FORMATS |= {own.__name__: lambda x, *_, own=own: own(x) for own in _ALL}
