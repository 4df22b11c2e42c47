"""Answers to the tasks of `kvcompress eval`, read from their prompts alone.

They share no code with the tasks: what they find in the text is the truth that the
tasks' own answers are held against.
"""

import re
from collections import Counter
from collections.abc import Callable

FACT = re.compile(r"One of the special magic \w+ for (.+?) is: (\S+)\.")
_ARTICLE = {
    "town did": r"Born in (\w+) in \d+, {name} was",
    "When was": r"Born in \w+ in (\d+), {name} was",
    "study": r"to learn (\w+) from",
    "taught": r"to learn \w+ from (\w+ \w+)\.",
    "title": r'made {name} famous, called "([^"]+)"',
    "last years": r"In later years {name} lived in (\w+),",
}


def niah(prompt: str) -> list[str]:
    asked = re.findall(r"for (.+?) mentioned in the provided text\?", prompt)[-1]
    keys = re.split(r", and |, ", asked)
    facts = FACT.findall(prompt)
    return [value for wanted in keys for key, value in facts if key == wanted]


def assignments(prompt: str) -> str:
    """What stands behind the solved example."""
    return prompt[prompt.rindex("Memorize and track") :]


def vt(prompt: str) -> list[str]:
    text = assignments(prompt)
    (value,) = re.findall(r"assigned the value (\d+) in the text", text)
    # In reading order: each variable is assigned after the one that it copies.
    holders: list[str] = []
    for name, copied, number in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))", text):
        if number == value or copied in holders:
            holders.append(name)
    return holders


def word_list(prompt: str) -> Counter[str]:
    listed = prompt[prompt.rindex("appear most often.\n") : prompt.rindex("\nQuestion")]
    return Counter(re.findall(r"\d+\. (.+?)(?= \d+\. |$)", listed, re.DOTALL))


def coded_words(prompt: str) -> Counter[str]:
    text = prompt[prompt.index("coded words. ") : prompt.rindex("\nQuestion")]
    return Counter(re.findall(r"\b[a-z]{6}\b", text.removeprefix("coded words. ")))


def most_common(counts: Counter[str], number: int) -> list[str]:
    ranked = counts.most_common(number + 1)
    assert ranked[number - 1][1] > ranked[number][1], "the answer is not unique"
    return [word for word, _ in ranked[:number]]


def documents(prompt: str) -> list[str]:
    parts = re.split(r"Document \d+:\n", prompt)
    return [part.split("\n\n")[0] for part in parts[1:]]


def qa(prompt: str) -> list[str]:
    question = prompt[prompt.rindex("Question: ") :]
    name = re.findall(r"[A-Z][a-z]+ [A-Z][a-z]+", question)[0]
    (article,) = [text for text in documents(prompt) if text.startswith(f"{name}\n")]
    (found,) = [
        re.findall(pattern.format(name=name), article)
        for words, pattern in _ARTICLE.items()
        if words in question
    ]
    return found


def needle(prompt: str) -> list[str]:
    key = prompt.rpartition(" recall ")[2]
    return re.findall(rf"\bremember {key} (\w+ \w+) \.", prompt)


SOLVERS: dict[str, Callable[[str], list[str]]] = {
    "niah": niah,
    "vt": vt,
    "cwe": lambda prompt: most_common(word_list(prompt), 10),
    "fwe": lambda prompt: most_common(coded_words(prompt), 3),
    "qa": qa,
    "needle": needle,
}


def solve(task: str, prompt: str) -> set[str]:
    """Return the answers that a careful reader of the prompt would give."""
    found = SOLVERS[task.partition("_")[0]](prompt)
    assert len(found) == len(set(found)), "the text has an answer twice"
    return set(found)
