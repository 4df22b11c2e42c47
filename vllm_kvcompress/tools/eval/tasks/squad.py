"""Questions from a file in the format of SQuAD (arXiv 1806.03822)."""

from dataclasses import dataclass
from pathlib import Path
from random import Random

from pydantic import BaseModel, ValidationError

from ...errors import ToolError
from .qa import Asked


class _Answer(BaseModel):
    text: str


class _Question(BaseModel):
    question: str
    answers: list[_Answer]
    is_impossible: bool = False  # only SQuAD 2 has it


class _Paragraph(BaseModel):
    context: str
    qas: list[_Question]


class _Article(BaseModel):
    paragraphs: list[_Paragraph]


class _File(BaseModel):
    data: list[_Article]


@dataclass(frozen=True)
class SquadFile:
    """The questions of a file.

    Attributes:
        questions: Each with its answers, its paragraph and the article's number.
        articles: The paragraphs of each article.
    """

    questions: list[tuple[str, tuple[str, ...], str, int]]
    articles: list[list[str]]

    def ask(self, rng: Random) -> Asked:
        """Draw a question; as in RULER the article's other paragraphs come first."""
        query, answers, document, article = rng.choice(self.questions)
        near = self.articles[article]
        far = [
            paragraph
            for number, paragraphs in enumerate(self.articles)
            if number != article
            for paragraph in paragraphs
        ]
        # Without duplicates, in this order.
        others = dict.fromkeys([*_shuffled(rng, near), *_shuffled(rng, far)])
        others.pop(document)
        return Asked(query, answers, document, iter(others), len(others))


def read_squad(path: str | Path) -> SquadFile:
    """Read a file.

    Raises:
        ToolError: It cannot be read, is of another format or has nothing to ask.
    """
    try:
        file = _File.model_validate_json(Path(path).read_bytes())
    except OSError as error:
        raise ToolError(f"questions {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ToolError(
            f"questions {path}: not in SQuAD's JSON format: "
            f"{where + ': ' if where else ''}{first['msg']}"
        ) from None
    questions = [
        (
            asked.question,
            tuple(dict.fromkeys(answer.text for answer in asked.answers)),
            paragraph.context,
            number,
        )
        for number, article in enumerate(file.data)
        for paragraph in article.paragraphs
        for asked in paragraph.qas
        if asked.answers and not asked.is_impossible
    ]
    articles = [[p.context for p in article.paragraphs] for article in file.data]
    if not questions:
        raise ToolError(f"questions {path}: none in it has an answer")
    if len({context for contexts in articles for context in contexts}) < 2:
        raise ToolError(f"questions {path}: it takes two paragraphs or more")
    return SquadFile(questions, articles)


def _shuffled(rng: Random, texts: list[str]) -> list[str]:
    return rng.sample(texts, len(texts))
