"""The needle task: find one of several facts in a long text.

A prompt is filler sentences with a few needles among them, one of which is asked
about at the end::

    the calm river finds the old mill . remember paris copper falcon . the ...
    ... the tall ship passes the grey island . recall paris

The answer is ``copper falcon``. The model that ships with the package (see
``scripts/make_needle_model.py``) answers every such prompt with its full cache, so
whatever is lost under compression was lost by the compression.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path


def _words(text: str) -> list[str]:
    return text.split()


BOS = "<s>"
ARTICLE, STOP, REMEMBER, RECALL = "the", ".", "remember", "recall"

KEYS = _words("""
    paris london rome berlin madrid vienna lisbon athens oslo dublin prague warsaw
    cairo delhi tokyo kyoto seoul lima quito havana boston denver dallas austin
    geneva zurich milan venice naples turin lyon nice bergen malmo riga tallinn
    sofia zagreb tunis dakar accra nairobi hanoi manila jakarta perth sydney hobart
""")
VALUES = _words("""
    copper silver golden bronze iron cobalt nickel zinc amber ruby emerald opal
    crimson scarlet violet indigo azure turquoise olive ivory ebony maroon beige teal
    falcon eagle raven sparrow heron swan owl crane tiger lion panther leopard
    otter badger beaver rabbit squirrel hedgehog weasel moose bison camel zebra giraffe
    apple cherry lemon mango papaya banana orange grape melon plum peach apricot
    maple willow cedar birch walnut chestnut poplar acacia jasmine lavender tulip orchid
    piano violin trumpet guitar banjo cello flute clarinet drum harp oboe tuba
    hammer chisel anvil lantern compass anchor ladder basket candle mirror button needle
""")
ADJECTIVES = _words("""
    calm old tall grey quiet narrow broad distant green gentle dusty empty steep busy
    warm cold dark bright early late wooden hidden modern little
""")
NOUNS = _words("""
    river mill ship island road bridge village harbour forest garden market tower
    meadow valley farmer sailor teacher baker window letter train station castle
    mountain field winter summer morning evening cloud
""")
VERBS = _words("""
    finds passes follows leaves joins crosses meets watches greets carries covers
    reaches guards likes paints describes
""")
INTENSIFIERS = _words("very rather quite truly fairly mostly deeply")

WORDS = [
    *(ARTICLE, STOP, REMEMBER, RECALL),
    *KEYS,
    *VALUES,
    *ADJECTIVES,
    *NOUNS,
    *VERBS,
    *INTENSIFIERS,
]

PROTECTED_TOKENS = 600
"""No needle lies in this many last tokens, so that recency alone cannot answer."""

_SENTENCE_TOKENS = 8
_NEEDLE_TOKENS = 5
_FRAME_TOKENS = 3  # <s> in front, "recall KEY" at the end


@dataclass(frozen=True)
class NeedlePrompt:
    """One prompt of the task with its answer.

    Attributes:
        prompt: The text, without ``<s>``, which the tokenizer adds.
        token_ids: The prompt's tokens, ``<s>`` included.
        answer: The two words that were to be remembered.
        answer_ids: Their tokens. The model goes on with ``.`` and the end.
        depth: Where the needle lies, as a share of the prompt: 0 is its start.
    """

    prompt: str
    token_ids: list[int]
    answer: str
    answer_ids: list[int]
    depth: float


def model_path() -> str:
    """Return the folder of the bundled model, for vLLM or ``from_pretrained``."""
    return str(resources.files("vllm_kvcompress.assets") / "needle")


@cache
def _vocabulary() -> dict[str, int]:
    text = Path(model_path(), "tokenizer.json").read_text(encoding="utf-8")
    return json.loads(text)["model"]["vocab"]


def _protected_tokens(num_tokens: int) -> int:
    """Length of the needle-free end; shorter prompts can only afford a share."""
    return min(PROTECTED_TOKENS, num_tokens * 5 // 8)


def _sentence(rng: random.Random, extra_words: int = 0) -> list[str]:
    """Make a filler sentence of ``8 + extra_words`` words, full stop included."""
    return [
        ARTICLE,
        *rng.sample(INTENSIFIERS, extra_words),
        rng.choice(ADJECTIVES),
        rng.choice(NOUNS),
        rng.choice(VERBS),
        ARTICLE,
        rng.choice(ADJECTIVES),
        rng.choice(NOUNS),
        STOP,
    ]


def _needle_prompt(
    rng: random.Random, num_tokens: int, needles: int, at: float | None
) -> NeedlePrompt:
    keys = rng.sample(KEYS, needles)
    values = rng.sample(VALUES, 2 * needles)  # distinct: each word has one successor
    facts = [(keys[i], values[2 * i], values[2 * i + 1]) for i in range(needles)]

    filler_tokens = num_tokens - _FRAME_TOKENS - needles * _NEEDLE_TOKENS
    num_sentences, extra_words = divmod(filler_tokens, _SENTENCE_TOKENS)
    # Slot i is the place before sentence i. Slot 0 stays free: some methods keep the
    # first tokens in any case. The last allowed slot is the last one that keeps even
    # the last needle, with all the others and the padding before it, out of the end.
    fixed = 1 + extra_words + needles * _NEEDLE_TOKENS
    last = (num_tokens - _protected_tokens(num_tokens) - fixed) // _SENTENCE_TOKENS
    if last < needles:
        raise ValueError(f"{num_tokens} tokens are too few for {needles} needles")
    slots = sorted(rng.sample(range(1, last + 1), needles))
    asked = rng.randrange(needles)
    if at is not None:
        wanted = 1 + round(at * (last - 1))
        if wanted in slots:
            slots[slots.index(wanted)] = slots[asked]
        slots[asked] = wanted
    padded = rng.randrange(num_sentences)  # the sentence that makes the length exact

    words: list[str] = []
    fact_at = dict(zip(slots, facts, strict=True))
    depth = 0.0
    for slot in range(num_sentences):
        if slot in fact_at:
            if slot == slots[asked]:
                depth = (1 + len(words)) / num_tokens
            words += [REMEMBER, *fact_at[slot], STOP]
        words += _sentence(rng, extra_words if slot == padded else 0)
    key, *answer = facts[asked]
    words += [RECALL, key]

    ids = _vocabulary()
    return NeedlePrompt(
        prompt=" ".join(words),
        token_ids=[ids[word] for word in (BOS, *words)],
        answer=" ".join(answer),
        answer_ids=[ids[word] for word in answer],
        depth=depth,
    )


def least_tokens(needles: int) -> int:
    """Tokens that a prompt with so many needles has at least."""
    # All of them, a slot each and the padding, in three eighths of the prompt.
    words = needles * (_NEEDLE_TOKENS + _SENTENCE_TOKENS) + _SENTENCE_TOKENS
    return -(-words * 8 // 3)


def needle_prompts(
    *,
    num_tokens: int,
    needles: int = 8,
    count: int,
    seed: int = 0,
    depth: float | None = None,
) -> list[NeedlePrompt]:
    """Make ``count`` prompts of exactly ``num_tokens`` tokens each.

    The needles lie at distinct random depths, none of them in the last 600 tokens
    (in prompts under 960 tokens: in the last five eighths).

    Args:
        num_tokens: Length of each prompt in tokens, ``<s>`` included.
        needles: Facts per prompt, at most 48; one of them is asked about.
        count: Number of prompts.
        seed: The same arguments and seed make the same prompts.
        depth: Where the needle lies that is asked about: 0 = near the start, 1 = last
            before the end that is free of needles; None = anywhere.

    Raises:
        ValueError: If there are no needles, too many, or too few tokens for them.
    """
    if not 1 <= needles <= len(KEYS):
        raise ValueError(f"needles must be from 1 to {len(KEYS)}, not {needles}")
    rng = random.Random(seed)
    return [_needle_prompt(rng, num_tokens, needles, depth) for _ in range(count)]


def accuracy(
    prompts: Sequence[NeedlePrompt], outputs: Sequence[Sequence[int]]
) -> float:
    """Return the share of prompts answered, from 0 to 1.

    Args:
        prompts: The prompts.
        outputs: Generated token ids, one sequence per prompt. An output is right if
            it begins with the whole answer.
    """
    if not prompts:
        raise ValueError("no prompts")
    right = sum(
        list(output[: len(prompt.answer_ids)]) == prompt.answer_ids
        for prompt, output in zip(prompts, outputs, strict=True)
    )
    return right / len(prompts)
