"""Two layers' vectors as one direction with two lengths (arXiv 2405.14366, 3.2)."""

import math
from dataclasses import dataclass

import torch

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
    lengths, units = zip(*map(_polar, (shallow, deep)), strict=True)
    cosine = (units[0] * units[1]).sum(-1).clamp(-1.0, 1.0)
    angle = torch.arccos(cosine)
    sine = torch.sin(angle)
    flat = sine < _PARALLEL
    sine = sine.masked_fill(flat, 1.0)
    weights = [
        torch.where(flat, share, torch.sin(share * angle) / sine)
        for share in (1.0 - t, t)
    ]
    direction = weights[0][..., None] * units[0] + weights[1][..., None] * units[1]
    length = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    empty = [own == 0 for own in lengths]
    # Opposite vectors in equal shares leave nothing, nor does a share of 1 in nothing.
    left = torch.where(empty[1][..., None], units[0], units[1])
    direction = torch.where(length > _PARALLEL, direction / length, left)
    reach = torch.maximum(lengths[0], LEAST_SHARE * lengths[1])
    distance = torch.where(empty[0] ^ empty[1], 1.0, angle / math.pi)
    return Merged(
        shared=reach[..., None] * direction,
        ratio=torch.where(reach > 0, lengths[1] / reach, 1.0),
        distance=distance.masked_fill(empty[0] & empty[1], 0.0),
    )


def _polar(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths ``[...]`` and unit vectors, zero for what has no direction."""
    vectors = vectors.float()
    length = torch.linalg.vector_norm(vectors, dim=-1)
    usable = torch.isfinite(length) & (length > 0)
    length = torch.where(usable, length, 0.0)
    unit = vectors / torch.where(usable, length, 1.0)[..., None]
    return length, torch.where(usable[..., None], unit, 0.0)


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
