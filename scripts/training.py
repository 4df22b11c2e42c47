"""The training loop of the scripts that train small models on a CPU."""

import math
import random
import time
from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

Batch = tuple[torch.Tensor, torch.Tensor]
"""Tokens, ``[sequences, tokens]`` int64, and which of them are answers, bool."""
Draw = Callable[[random.Random, int, int], Batch]
"""Makes a batch of so many sequences of at most so many tokens."""


def fit(model: PreTrainedModel, draw: Draw, stages: str, rate: float) -> float:
    """Train a model on answers, telling loss and accuracy now and then.

    Args:
        model: It is changed, and is in training mode.
        draw: The task.
        stages: LENGTHxBATCHxSTEPS, one after the other, with commas between.
        rate: Highest learning rate; it rises for 50 steps and falls along a cosine.

    Returns:
        Seconds it took.
    """
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    started, shares = time.monotonic(), []
    plan = [tuple(map(int, stage.split("x"))) for stage in stages.split(",")]
    total = sum(steps for _, _, steps in plan)
    step = 0
    for length, size, steps in plan:
        for _ in range(steps):
            warm = min(1.0, (step + 1) / 50)
            fall = (1 + math.cos(math.pi * step / total)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate * warm * (0.05 + 0.95 * fall)
            tokens, asked = draw(rng, size, length)
            mask, wanted = asked[:, 1:], tokens[:, 1:]
            logits = model(tokens[:, :-1]).logits
            loss = cross_entropy(logits[mask], wanted[mask])
            # Keys that are never wanted would all look alike to the model.
            rest = cross_entropy(logits.flatten(0, 1), wanted.flatten())
            loss = loss + 0.1 * rest
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            right = logits[mask].argmax(-1) == wanted[mask]
            shares.append(right.float().mean().item())
            step += 1
            if step % 50 == 0:
                recent = sum(shares[-50:]) / 50
                print(
                    f"step {step}/{total} length {length} loss {loss.item():.3f} "
                    f"right {recent:.3f} {time.monotonic() - started:.0f} s",
                    flush=True,
                )
    return time.monotonic() - started
