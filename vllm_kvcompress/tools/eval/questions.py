"""The questions of an evaluation as tokens, the same for all arms."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ToolError
from .conversation import Question
from .folder import Key
from .tasks import TASKS, Sample

LONGBENCH, HARNESS = "longbench", "lm_eval:"


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


def task_names(text: str) -> list[str]:
    """Split ``--tasks``, and check the names of our own ones."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in TASKS and not is_harness(name):
            known = ", ".join([*TASKS, LONGBENCH, f"{HARNESS}NAME"])
            raise ToolError(f"unknown task {name!r}; allowed values: {known}")
    return names


def is_harness(task: str) -> bool:
    """Whether it is one of lm-evaluation-harness."""
    return task == LONGBENCH or task.startswith(HARNESS)


def make_items(
    tokenizer: Any,
    tasks: Sequence[str],
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
        tasks: Names of `TASKS`.
        lengths: In tokens.
        depths: Where needles lie, 0 to 1; None = anywhere.
        samples: Of each task, length and depth.
        seed: The same seed makes the same questions.
        outside: The question is not part of the prompt.
    """
    items = []
    for task in tasks:
        for length in lengths:
            number = 0
            for depth in depths or [None]:
                for sample in TASKS[task].make(
                    tokenizer, length, samples, seed, depth=depth
                ):
                    at = sample.depth if depth is None else depth
                    asked = as_question(tokenizer, sample, outside)
                    items.append(Item((task, length, number), sample, at, asked))
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
