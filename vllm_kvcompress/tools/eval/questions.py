"""The questions of an evaluation as tokens, the same for all arms."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .conversation import Question
from .folder import Key
from .tasks import Sample, Task


@dataclass(frozen=True)
class Item:
    """One question, and which it is.

    Attributes:
        key: Task, length asked for, and number.
        sample: The text.
        depth: As asked for, or else as it came; 0 to 1.
        asked: What is sent.
    """

    key: Key
    sample: Sample
    depth: float | None
    asked: Question


def make_items(
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    lengths: Sequence[int],
    depths: Sequence[float] | None,
    samples: int,
    seed: int,
    outside: bool,
) -> list[Item]:
    """Make all questions.

    Args:
        tokenizer: Of the model.
        tasks: What is asked.
        lengths: In tokens.
        depths: Where needles lie, 0 to 1, in tasks that have any; None = anywhere.
        samples: Of each task, length and depth.
        seed: The same seed makes the same questions.
        outside: The question is not part of the prompt.
    """
    items: list[Item] = []
    for task in tasks:
        for length in lengths:
            number = 0
            places: Sequence[float | None] = (
                depths if depths and task.has_depth else [None]
            )
            for depth in places:
                for sample in task.make(tokenizer, length, samples, seed, depth):
                    at = sample.depth if depth is None else depth
                    asked = as_question(tokenizer, sample, outside)
                    items.append(Item((task.name, length, number), sample, at, asked))
                    number += 1
    return items


def as_question(tokenizer: Any, sample: Sample, outside: bool) -> Question:
    """Tokenise a sample as a whole, and cut where its question begins.

    Both places of the question see the same tokens; one that holds text of both sides
    belongs to the question.
    """
    whole = tokenizer(sample.context + sample.question)["input_ids"]
    if not outside:
        return Question(whole, [], sample.max_tokens)
    context = tokenizer(sample.context)["input_ids"]
    cut = next(
        (i for i, (a, b) in enumerate(zip(whole, context, strict=False)) if a != b),
        min(len(whole), len(context)),
    )
    return Question(whole[:cut], whole[cut:], sample.max_tokens)
