"""RULER's question answering (arXiv 2404.06654): one of many documents knows."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Protocol

from .base import Draft, Sample, Task, Text
from .haystack import Growing, place

INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do "
    "not output any other words.\n\n"
)
INTRO = f"{INSTRUCTION}The following are given documents.\n\n"
QUESTION = f"\n\n{INSTRUCTION}Question: {{query}} Answer:"


@dataclass(frozen=True)
class Asked:
    """A question.

    Attributes:
        query: Its words.
        answers: Any of them is right.
        document: Where the answer stands.
        others: Documents that do not answer it.
        count: Of the others, None = no end.
    """

    query: str
    answers: tuple[str, ...]
    document: str
    others: Iterator[str]
    count: int | None = None


class Questions(Protocol):
    """Where questions come from."""

    def ask(self, rng: Random) -> Asked:
        """Draw one."""


@dataclass(frozen=True)
class Qa(Task):
    """A question about one of many documents.

    Attributes:
        questions: Where they come from.
    """

    questions: Questions

    max_tokens: ClassVar[int] = 32

    def score(self, output: str, sample: Sample) -> float:
        """Return 1 if one of the answers is in the output, else 0."""
        output = output.lower()
        return float(any(answer.lower() in output for answer in sample.answers))

    def _draft(self, rng: Random, length: int, depth: float | None) -> Draft:
        asked = self.questions.ask(rng)
        at = rng.random() if depth is None else depth
        others = Growing(asked.others)
        question = QUESTION.format(query=asked.query)

        def render(units: int) -> Text:
            documents = place(others.first(units), [(at, asked.document)])
            context = "\n\n".join(
                f"Document {number}:\n{document}"
                for number, document in enumerate(documents, 1)
            )
            return Text(INTRO + context, question, asked.answers, at)

        return Draft(render, least=1, most=asked.count)
