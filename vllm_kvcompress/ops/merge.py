"""Two layers' vectors as one direction with two lengths (arXiv 2405.14366, 3.2)."""

import math
from dataclasses import dataclass

import torch

from .providers import Operation

# The shallow layer's length is at least this share of the deep one's, so that their
# ratio is finite in float16 wherever the shallow vector is zero.
LEAST_SHARE = 2.0**-14
_PARALLEL = 1e-6


@dataclass(frozen=True)
class Merged:
    """Vectors of two layers after merging, all float32.

    Attributes:
        shared: ``[..., head_size]``, of the shallow layer's length: what it reads.
        ratio: ``[...]``; the deep layer reads ``shared`` times this.
        distance: ``[...]``, the angle between both as a share of pi, 0 to 1.
    """

    shared: torch.Tensor
    ratio: torch.Tensor
    distance: torch.Tensor


@Operation
def merge(shallow: torch.Tensor, deep: torch.Tensor, t: float) -> Merged:
    """Interpolate two layers' directions on the sphere and keep both lengths.

    Where sin(angle) vanishes the interpolation is linear. Of a zero vector, or one
    with NaN or inf in it, nothing is taken: the other one's direction is, and the
    distance is 1, so that the token is the first to be retained.

    Args:
        shallow: ``[..., head_size]``.
        deep: The same.
        t: 0 takes the shallow layer's direction, 1 the deep one's.
    """
    (first, second), lengths = zip(*map(_usable, (shallow, deep)), strict=True)
    divisors = [torch.where(length > 0, length, 1.0) for length in lengths]
    cosine = (first * second).sum(-1) / divisors[0] / divisors[1]
    angle = torch.arccos(cosine.clamp_(-1.0, 1.0))
    sine = torch.sin(angle)
    flat = sine < _PARALLEL
    sine = sine.masked_fill(flat, 1.0)
    low, high = (
        torch.where(flat, share, torch.sin(share * angle) / sine)
        for share in (1.0 - t, t)
    )
    shared = (low / divisors[0])[..., None] * first
    shared.addcmul_((high / divisors[1])[..., None], second)
    length = torch.linalg.vector_norm(shared, dim=-1)
    empty = [length == 0 for length in lengths]
    lost = length < _PARALLEL
    if lost.any():
        # Opposite vectors in equal shares leave nothing, nor does a share of 1 in none.
        rest = torch.where(empty[1], 0, 1) / divisors[1]
        other = rest[..., None] * second
        other += torch.where(empty[1], 1 / divisors[0], 0.0)[..., None] * first
        shared = torch.where(lost[..., None], other, shared)
        length = torch.linalg.vector_norm(shared, dim=-1)
    reach = torch.maximum(lengths[0], LEAST_SHARE * lengths[1])
    shared *= (reach / torch.where(length > 0, length, 1.0))[..., None]
    distance = torch.where(empty[0] ^ empty[1], 1.0, angle / math.pi)
    return Merged(
        shared=shared,
        ratio=torch.where(reach > 0, lengths[1] / reach, 1.0),
        distance=distance.masked_fill(empty[0] & empty[1], 0.0),
    )


def _usable(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 with zeros for vectors that hold NaN or are infinitely long; lengths."""
    vectors = vectors.float()
    length = torch.linalg.vector_norm(vectors, dim=-1)
    finite = length.isfinite()
    if finite.all():
        return vectors, length
    vectors = torch.where(finite[..., None], vectors, 0.0)
    return vectors, torch.where(finite, length, 0.0)


def strangeness(*distances: torch.Tensor) -> torch.Tensor:
    """How little a token lends itself to merging, from its distances.

    Each kind of distance (of keys, of values) is counted from the smallest to the
    largest of a KV head, and a token's largest share is taken: keys and values of a
    token lie in one slot, so both are retained or none.

    Args:
        *distances: ``[kv_heads, tokens]`` float32 each.

    Returns:
        ``[kv_heads, tokens]`` float32, 0 to 1. A token with 1 - gamma or more is what
        the paper's rule retains, with its sign put right: the printed one retains the
        tokens that are most alike.
    """
    shares = []
    for distance in distances:
        low, high = distance.aminmax(dim=-1, keepdim=True)
        span = high - low
        shares.append((distance - low) / span.masked_fill(span == 0, 1.0))
    return torch.stack(shares).amax(0)
