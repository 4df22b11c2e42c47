"""What a task is, and how its prompts get the length that was asked for."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from ...errors import ToolError
from .fit import fit

NEAR = 0.98
"""Share of the length that a prompt has at least, if the task's text does not end."""


@dataclass(frozen=True)
class Sample:
    """One question. The prompt is ``context + question``.

    Attributes:
        task: Name of the task.
        context: The long text.
        question: What is asked, from the joint with the context to the lead-in of the
            answer.
        answers: What a right output has in it.
        depth: Of the (first) asked needle in the text around it, 0 = start, 1 = end;
            None where the answer lies everywhere.
        length: Tokens asked for; the prompt has so many or a few less.
        max_tokens: Output tokens that the answer may take.
    """

    task: str
    context: str
    question: str
    answers: tuple[str, ...]
    depth: float | None
    length: int
    max_tokens: int


@dataclass(frozen=True)
class Text:
    """A sample without what is the same for all samples of a task."""

    context: str
    question: str
    answers: tuple[str, ...]
    depth: float | None = None


@dataclass(frozen=True)
class Draft:
    """A sample whose length is open.

    Attributes:
        render: Makes the text with a number of units of filler; more units, more
            tokens, and the same question.
        least: Units that the task needs.
        most: Units that there are, None = no end.
    """

    render: Callable[[int], Text]
    least: int
    most: int | None = None


@dataclass(frozen=True)
class Task(ABC):
    """Questions of one kind.

    Attributes:
        name: In RULER's spelling where it is one of RULER's.
        summary: One sentence.
    """

    name: str
    summary: str

    max_tokens: ClassVar[int]
    """Output tokens that an answer may take."""
    has_depth: ClassVar[bool] = True
    """Whether there is a needle to be put somewhere."""

    def make(
        self,
        tokenizer: Any,
        length: int,
        count: int,
        seed: int,
        depth: float | None = None,
    ) -> list[Sample]:
        """Make samples; the i-th depends on the arguments, but not on ``count``.

        Args:
            tokenizer: Of transformers.
            length: Tokens of each prompt, special tokens included.
            count: Number of samples.
            seed: Other seeds make other samples. Of one seed, samples have the same
                needles at all lengths and depths, so that these can be compared.
            depth: Where the (first) asked needle lies, 0 = start of the text, 1 = end;
                None = anywhere.

        Raises:
            ToolError: The length or the depth is impossible.
        """
        if depth is not None and not self.has_depth:
            raise ToolError(f"{self.name} has no depth: its answer lies everywhere")
        if depth is not None and not 0 <= depth <= 1:
            raise ToolError(f"a depth is from 0 to 1, not {depth:g}")
        drafts = [
            self._draft(Random(f"{self.name} {seed} {index}"), length, depth)
            for index in range(count)
        ]

        def tokens(text: Text) -> int:
            return len(tokenizer.encode(text.context + text.question))

        smallest = max((tokens(d.render(d.least)) for d in drafts), default=0)
        if smallest > length:
            raise ToolError(
                f"{self.name}: {length} tokens are too few, it takes {smallest}"
            )
        return [self._sample(draft, length, tokens) for draft in drafts]

    def score(self, output: str, sample: Sample) -> float:
        """Return the share of the answers that the output has in it."""
        output = output.lower()
        found = sum(answer.lower() in output for answer in sample.answers)
        return found / len(sample.answers)

    def _sample(
        self, draft: Draft, length: int, tokens: Callable[[Text], int]
    ) -> Sample:
        units, used = fit(
            lambda units: tokens(draft.render(units)), length, draft.least, draft.most
        )
        if units == draft.most and used < NEAR * length:
            raise ToolError(
                f"{self.name}: its documents end at {used} of {length} tokens; "
                "ask for a shorter length or give a longer file"
            )
        text = draft.render(units)
        return Sample(
            task=self.name,
            context=text.context,
            question=text.question,
            answers=text.answers,
            depth=text.depth,
            length=length,
            max_tokens=self.max_tokens,
        )

    @abstractmethod
    def _draft(self, rng: Random, length: int, depth: float | None) -> Draft:
        """Draw everything about a sample but its number of units."""
