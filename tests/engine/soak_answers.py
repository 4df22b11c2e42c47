"""What a soaked server should answer."""

from os.path import commonprefix
from typing import Any, NamedTuple

from vllm_kvcompress.config import KEY

ALIKE = 0.1  # in log-probability


class Words(NamedTuple):
    """An answer up to where two words are alike: the order of additions decides there.

    Attributes:
        words: Each token of the model is one.
        whole: Whether these are all.
    """

    words: list[str]
    whole: bool


class Expected(NamedTuple):
    """What is answered to a request alone: with compression, and without."""

    compressed: Words
    plain: Words

    def given(self, usage: dict[str, Any] | None) -> tuple[Words, str]:
        """What is certain of an answer under load, and how much that is.

        A prompt that waits for private blocks is answered as without compression
        until it gets some.

        Args:
            usage: What the server says of its compression, None = nothing.
        """
        if self.compressed == self.plain or (usage and not usage["waited"]):
            tie = "" if self.compressed.whole else ", up to a tie"
            return self.compressed, f"as alone{tie}"
        pair = [words for words, _ in self]
        return Words(commonprefix(pair), False), "as far as both are alike"


def certain_words(choice: dict[str, Any]) -> Words:
    """Of one of the answers."""
    words = choice["text"].split()
    for count, best in enumerate(choice["logprobs"]["top_logprobs"]):
        first, second, *_ = sorted(best.values(), reverse=True)
        if first - second < ALIKE:
            return Words(words[:count], False)
    return Words(words, True)


def usage_of(answer: dict[str, Any]) -> dict[str, Any]:
    """What a server says of the compression of a request."""
    found: dict[str, Any] = (answer.get("kv_transfer_params") or {}).get(KEY, {})
    return found


def texts_of(answer: dict[str, Any]) -> list[str]:
    """In the order of their numbers."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    return [choice["text"] for choice in choices]
