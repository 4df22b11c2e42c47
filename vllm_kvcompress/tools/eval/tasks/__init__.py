"""The tasks of `kvcompress eval`: long prompts whose right answers are known.

Most are RULER's (arXiv 2404.06654), with its prompts' wording, numbers of needles,
output lengths and scores, so that results can be compared with published ones. Two
things are different: ``length`` is the prompt's alone, where RULER's holds the output
too, and texts are made here instead of downloaded.
"""

from pathlib import Path

from .base import Sample, Task
from .common_words import CommonWords
from .encyclopedia import Encyclopedia
from .frequent_words import FrequentWords
from .haystack import find_haystack
from .needle import Needle
from .niah import Niah
from .qa import Qa
from .squad import read_squad
from .variable_tracking import VariableTracking

__all__ = ["TASKS", "Sample", "Task", "make_tasks"]


def make_tasks(
    haystack: str = "noise", qa_file: str | Path | None = None
) -> dict[str, Task]:
    """Return all tasks by name.

    Args:
        haystack: What needles are hidden in: ``noise`` (RULER's five sentences),
            ``essay`` (made-up sentences that differ), or a text file.
        qa_file: Questions for ``qa`` in SQuAD's JSON format; made up without it.

    Raises:
        ToolError: A file cannot be used.
    """
    hay = find_haystack(haystack)
    questions = Encyclopedia() if qa_file is None else read_squad(qa_file)
    tasks: list[Task] = [
        Niah("niah_single", "One needle, asked for by its key.", haystack=hay),
        Niah(
            "niah_single_3",
            "One needle whose value is a UUID.",
            haystack=hay,
            value_kind="uuids",
        ),
        Niah(
            "niah_multikey",
            "Four needles, of which one is asked for.",
            haystack=hay,
            keys=4,
        ),
        Niah("niah_multikey_2", "One needle among nothing but needles.", haystack=None),
        Niah(
            "niah_multikey_3",
            "The same, with UUIDs as keys and values.",
            haystack=None,
            key_kind="uuids",
            value_kind="uuids",
        ),
        Niah(
            "niah_multivalue",
            "Four needles with the same key, all asked for.",
            haystack=hay,
            values=4,
        ),
        Niah(
            "niah_multiquery",
            "Four needles, all asked for.",
            haystack=hay,
            keys=4,
            asked=4,
        ),
        VariableTracking("vt", "The variables that got a value, hop by hop.", hay),
        CommonWords("cwe", "The ten most common words of a numbered list."),
        FrequentWords("fwe", "The three most frequent words of a coded text."),
        Qa("qa", "A question that one of many documents answers.", questions),
        Needle("needle", "One of eight facts, in the bundled model's own words."),
    ]
    return {task.name: task for task in tasks}


TASKS = make_tasks()
