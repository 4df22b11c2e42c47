"""What a run measured, from its recorded engine steps: arithmetic only.

A *decode step* computes no prompt token: every request in it already had its
first token and gets its next one. Decode speed and held memory are read from the
*widest* decode steps, those with as many requests as the run ever decoded at once,
so that neither prefill nor the thinning end of a run blurs them. The speed is that of
the median step, so that a hiccup of the machine does not either.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

Measures = dict[str, float]


@dataclass(frozen=True)
class Step:
    """One engine step, seen from outside.

    Attributes:
        seconds: How long it took.
        end: When it ended, in seconds since the first request was added.
        prompt: Whether a prompt token was computed (or recomputed) in it.
        tokens: Output tokens by request.
        running: Requests that held KV blocks in it.
        held_blocks: Blocks that were not free when it ended.
    """

    seconds: float
    end: float
    prompt: bool
    tokens: Mapping[str, int]
    running: int
    held_blocks: int


def widest_decode(steps: Sequence[Step]) -> list[Step]:
    """The decode steps with the most requests."""
    decode = [step for step in steps if step.tokens and not step.prompt]
    width = max((len(step.tokens) for step in decode), default=0)
    return [step for step in decode if len(step.tokens) == width]


def first_tokens(steps: Sequence[Step]) -> list[float]:
    """When each request got its first token, in the order of those tokens."""
    first: dict[str, float] = {}
    for step in steps:
        for request in step.tokens:
            first.setdefault(request, step.end)
    return list(first.values())


def measure(steps: Sequence[Step], *, block_bytes: int, preemptions: int) -> Measures:
    """Turn the steps of one run into its figures.

    Args:
        steps: All steps, first to last.
        block_bytes: Bytes of one KV block over all layers.
        preemptions: How often a request lost its blocks and started again.
    """
    widest = widest_decode(steps)
    step_s = median([step.seconds for step in widest] or [0.0])
    width = len(widest[0].tokens) if widest else 0
    produced = sum(sum(step.tokens.values()) for step in steps)
    held = [step.held_blocks for step in widest]
    share = [step.held_blocks / len(step.tokens) for step in widest]
    return {
        "decode_tokens_per_s": width / step_s if step_s else 0.0,
        "throughput_tokens_per_s": produced / steps[-1].end if steps else 0.0,
        "ttft_s": median(first_tokens(steps) or [0.0]),
        "peak_running": max((step.running for step in steps), default=0),
        "kv_bytes_held": max(held, default=0) * block_bytes,
        "preemptions": preemptions,
        "kv_blocks_per_request": median(share or [0.0]),
        "decode_requests": width,
        "decode_steps": len(widest),
        "decode_step_s": step_s,
    }


def medians(runs: Sequence[Measures]) -> Measures:
    """Fold repeated runs of the same arm into one."""
    return {key: median(run[key] for run in runs) for key in runs[0]}


def ratio(value: float, base: float) -> float | None:
    """``value / base``; None where the base is zero."""
    return value / base if base else None
