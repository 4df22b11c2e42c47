"""What a task is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sample:
    """A text, a question about it, and what would be right."""

    task: str
    context: str
    question: str
    answers: tuple[str, ...]
    depth: float | None
    length: int
    max_tokens: int


@dataclass(frozen=True)
class Task:
    """How samples are made, and answers graded from 0 to 1."""

    name: str
    summary: str
    make: Callable[..., list[Sample]]
    score: Callable[[str, Sample], float]


Tokenizer = Any
