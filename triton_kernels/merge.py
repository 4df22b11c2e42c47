"""Two layers' vectors as one, with two lengths: the meaning is ops/merge.py."""

import math

import torch
import triton
import triton.language as tl

from vllm_kvcompress.ops.merge import _PARALLEL, LEAST_SHARE, Merged

from .launch import parameters
from .pages import power_of_2, tile

_PI = tl.constexpr(math.pi)
_FLAT = tl.constexpr(_PARALLEL)
_LEAST_SHARE = tl.constexpr(LEAST_SHARE)


@triton.jit
def _arcsine(x):
    """Of 0 to 0.5; the rational function of FreeBSD's msun."""
    z = x * x
    above = z * (0.16666586697 + z * (-0.042743422091 + z * -0.0086563630030))
    return x + x * (above / (1.0 - 0.70662963390 * z))


@triton.jit
def _arccosine(x):
    size = tl.abs(x)
    small = size < 0.5
    below = _arcsine(tl.where(small, size, tl.sqrt((1.0 - size) * 0.5)))
    angle = tl.where(small, _PI / 2 - below, 2.0 * below)
    return tl.where(x < 0, _PI - angle, angle)


@triton.jit
def _usable(vectors):
    """With zeros for vectors that hold NaN or are infinitely long; lengths."""
    length = tl.sqrt(tl.sum(vectors * vectors, 1))
    finite = length < float("inf")
    vectors = tl.where(finite[:, None], vectors, 0.0)
    return vectors, tl.where(finite, length, 0.0)


@triton.jit
def _interpolated(first, second, lengths, divisors, t, rest):
    """A vector between two on the sphere, and the angle between both."""
    cosine = tl.sum(first * second, 1) / divisors[0] / divisors[1]
    angle = _arccosine(tl.minimum(tl.maximum(cosine, -1.0), 1.0))
    sine = tl.sin(angle)
    flat = sine < _FLAT
    sine = tl.where(flat, 1.0, sine)
    low = tl.where(flat, rest, tl.sin(rest * angle) / sine) / divisors[0]
    high = tl.where(flat, t, tl.sin(t * angle) / sine) / divisors[1]
    between = low[:, None] * first + high[:, None] * second
    # Opposite vectors in equal shares leave nothing, nor does a share of 1 in none.
    lost = tl.sqrt(tl.sum(between * between, 1)) < _FLAT
    empty = lengths[1] == 0
    low = tl.where(lost, tl.where(empty, 1.0 / divisors[0], 0.0), low)
    high = tl.where(lost, tl.where(empty, 0.0, 1.0 / divisors[1]), high)
    return low[:, None] * first + high[:, None] * second, angle


@triton.jit(do_not_specialize=["count"])
def _merge_kernel(
    shallow_ptr,
    deep_ptr,
    shared_ptr,
    ratio_ptr,
    distance_ptr,
    shallow_steps,
    deep_steps,
    count,
    t,
    rest,
    HEAD_SIZE: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < count
    first, first_length = _usable(
        tile(
            shallow_ptr,
            row * shallow_steps[0],
            inside,
            shallow_steps[1],
            HEAD_SIZE,
            BLOCK_HEAD,
            tl.float32,
        )
    )
    second, second_length = _usable(
        tile(
            deep_ptr,
            row * deep_steps[0],
            inside,
            deep_steps[1],
            HEAD_SIZE,
            BLOCK_HEAD,
            tl.float32,
        )
    )
    lengths = (first_length, second_length)
    divisors = (
        tl.where(first_length > 0, first_length, 1.0),
        tl.where(second_length > 0, second_length, 1.0),
    )
    shared, angle = _interpolated(first, second, lengths, divisors, t, rest)
    length = tl.sqrt(tl.sum(shared * shared, 1))
    reach = tl.maximum(first_length, _LEAST_SHARE * second_length)
    shared *= (reach / tl.where(length > 0, length, 1.0))[:, None]
    some = reach > 0
    ratio = tl.where(some, second_length / tl.where(some, reach, 1.0), 1.0)
    one_empty = (first_length == 0) != (second_length == 0)
    distance = tl.where(one_empty, 1.0, tl.where(some, angle / _PI, 0.0))
    column = tl.arange(0, BLOCK_HEAD)[None, :]
    at = row[:, None] * HEAD_SIZE + column
    mask = inside[:, None] & (column < HEAD_SIZE)
    tl.store(shared_ptr + at, shared, mask=mask)
    tl.store(ratio_ptr + row, ratio, mask=inside)
    tl.store(distance_ptr + row, distance, mask=inside)


def merge(shallow: torch.Tensor, deep: torch.Tensor, t: float) -> Merged:
    """See `merge.merge`."""
    shape, head_size = shallow.shape[:-1], shallow.shape[-1]
    vectors = [x.reshape(-1, head_size) for x in (shallow, deep)]
    count = len(vectors[0])
    shared = torch.empty(*shape, head_size, device=shallow.device)
    ratio = torch.empty(shape, device=shallow.device)
    distance = torch.empty(shape, device=shallow.device)
    if count:
        launch = parameters("merge", shallow.device)
        _merge_kernel[triton.cdiv(count, launch["BLOCK_ROWS"]),](
            *(*vectors, shared, ratio, distance),
            *(x.stride() for x in vectors),
            *(count, float(t), 1.0 - t),
            HEAD_SIZE=head_size,
            BLOCK_HEAD=power_of_2(head_size),
            **launch,
        )
    return Merged(shared=shared, ratio=ratio, distance=distance)
