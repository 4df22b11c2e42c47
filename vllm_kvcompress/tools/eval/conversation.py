"""What one question asks of an engine, whoever carries the requests.

Greedy decoding throughout, so that an arm differs from stock by its cache alone.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .fidelity import TOP, Top, fidelity

FORCED = "forced_tokens"  # see `forced`, which imports vLLM


@dataclass(frozen=True)
class Reference:
    """The beginning of stock's answer, to be followed by the other arms.

    Attributes:
        tokens: What it generated.
        top: Log-probabilities of the most likely tokens at each of these positions.
    """

    tokens: list[int]
    top: list[dict[int, float]]

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> "Reference":
        """Read it again: JSON has no numbers as keys."""
        top = [{int(token): p for token, p in each.items()} for each in given["top"]]
        return cls(given["tokens"], top)


@dataclass(frozen=True)
class Question:
    """What is sent of a sample.

    Attributes:
        prompt: Token ids, with or without the question.
        question: Token ids that are forced as the first output.
        max_tokens: Of the answer behind them.
    """

    prompt: list[int]
    question: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Request:
    """One request."""

    prompt: list[int]
    forced: list[int]
    max_tokens: int
    ignore_eos: bool
    logprobs: int | None


@dataclass(frozen=True)
class Answer:
    """What came back, tokens that were forced included."""

    tokens: list[int]
    top: Sequence[Top]
    finish_reason: str


@dataclass(frozen=True)
class Rules:
    """What holds for all questions of an arm.

    Attributes:
        fidelity_tokens: Positions at which an arm is compared with stock; 0 = none.
        forces: Whether the engine can be made to follow stock's answer. Otherwise the
            comparison ends where the answers part.
        stop_tokens: Those that end an answer.
    """

    fidelity_tokens: int
    forces: bool
    stop_tokens: list[int] = field(default_factory=list)


Outcome = dict[str, Any]


def converse(
    asked: Question, rules: Rules, reference: Reference | None
) -> Generator[Request, Answer, Outcome]:
    """Ask for an answer and, where it leaves stock's, for the way along stock's.

    Args:
        asked: What to ask.
        rules: How.
        reference: Stock's answer; None if stock itself is asked.

    Returns:
        Answer tokens, why they ended, and ``reference`` (stock) or ``fidelity``.
    """
    skip, stops = len(asked.question), set(rules.stop_tokens)
    logprobs = TOP if rules.fidelity_tokens else None
    answer = yield Request(
        prompt=asked.prompt,
        forced=asked.question,
        max_tokens=skip + asked.max_tokens,
        ignore_eos=not stops.isdisjoint(asked.question),
        logprobs=logprobs,
    )
    tokens, top = answer.tokens[skip:], answer.top[skip:]
    ended = next((i for i, token in enumerate(tokens) if token in stops), None)
    reason = answer.finish_reason
    if ended is not None:
        tokens, reason = tokens[: ended + 1], "stop"
    outcome: Outcome = {"tokens": tokens, "finish_reason": reason}
    if not rules.fidelity_tokens:
        return outcome
    if reference is None:
        first = min(len(tokens), rules.fidelity_tokens)
        outcome["reference"] = {
            "tokens": tokens[:first],
            "top": [dict(each) for each in top[:first]],
        }
        return outcome
    known = _common_prefix(tokens, reference.tokens) + 1  # the next has the same past
    if known < len(reference.tokens) and rules.forces:
        forced = [*asked.question, *reference.tokens]
        followed = yield Request(asked.prompt, forced, len(forced), True, logprobs)
        top = followed.top[skip:]
    else:
        top = top[:known]
    found = fidelity(reference.tokens, reference.top, top)
    outcome["fidelity"] = found and asdict(found)
    return outcome


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    different = (i for i, (a, b) in pairs if a != b)
    return next(different, min(len(one), len(other)))
