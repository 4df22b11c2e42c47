"""The tasks of `kvcompress eval`: answers, lengths and depths, for any tokenizer."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.unit.task_solvers import (
    FACT,
    assignments,
    coded_words,
    documents,
    solve,
    word_list,
)
from vllm_kvcompress.tools.errors import ToolError
from vllm_kvcompress.tools.eval.tasks import TASKS, Sample, Task, make_tasks
from vllm_kvcompress.tools.eval.tasks.fit import fit
from vllm_kvcompress.tools.needle import model_path

UNIT = {"qa": 220, "niah_multikey_3": 130}
"""Tokens of the largest piece of filler; 60 in other tasks."""
NEEDLES = [name for name, task in TASKS.items() if task.has_depth]
SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
drawn = settings(deadline=None, max_examples=3, suppress_health_check=SLOW)


class Characters:
    """The fastest tokenizer that there is, for what does not depend on it."""

    def encode(self, text: str) -> str:
        return text


def wrapped(core: Tokenizer) -> PreTrainedTokenizerFast:
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-pair encoding like Llama 3's, learned from the tasks' own texts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [
        sample.context
        for task in (*TASKS.values(), make_tasks("essay")["niah_single"])
        for sample in task.make(Characters(), 10_000, 1, seed=9)
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return wrapped(core)


def whitespace() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(core)


@pytest.fixture(scope="module", params=[byte_level, whitespace])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.param()


@pytest.fixture(scope="module")
def bundled() -> Any:
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def squad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty articles of four paragraphs; each paragraph has a question."""
    data = [
        {
            "paragraphs": [
                {
                    "context": f"Item {a}-{p} weighs {a * 10 + p} grams. It is old.",
                    "qas": [
                        {
                            "question": f"How heavy is item {a}-{p}?",
                            "answers": [{"text": f"{a * 10 + p} grams"}] * 3,
                            "is_impossible": False,
                        },
                        {"question": "Why?", "answers": [], "is_impossible": True},
                    ],
                }
                for p in range(4)
            ]
        }
        for a in range(50)
    ]
    path = tmp_path_factory.mktemp("squad") / "squad.json"
    path.write_text(json.dumps({"version": "2.0", "data": data}))
    return path


def prompt(sample: Sample) -> str:
    return sample.context + sample.question


def tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer.encode(text))


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
@drawn
@given(length=st.integers(1000, 5000), seed=st.integers(0, 99))
def test_right_and_long_enough(task: Task, tokenizer, length: int, seed: int) -> None:
    (sample,) = task.make(tokenizer, length, 1, seed)
    assert solve(task.name, prompt(sample)) == set(sample.answers)
    used = tokens(tokenizer, prompt(sample))
    slack = max(0.02 * length, UNIT.get(task.name, 60))
    assert length - slack <= used <= length == sample.length


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_score(task: Task, tokenizer) -> None:
    for sample in task.make(tokenizer, 2000, 3, seed=0):
        first, *others = sample.answers
        right = f"I think: {', '.join(reversed(sample.answers))}!"
        assert task.score(right, sample) == task.score(right.upper(), sample) == 1
        assert task.score("", sample) == task.score("no idea", sample) == 0
        share = task.score(f"It is {first}.", sample)
        assert share == 1 / (1 + len(others))


def test_any_answer_of_qa_will_do(tokenizer) -> None:
    (sample,) = TASKS["qa"].make(tokenizer, 1000, 1, seed=0)
    either = replace(sample, answers=("Rome", "city of Rome"))
    assert TASKS["qa"].score("It was rome.", either) == 1
    assert TASKS["qa"].score("It was Paris.", either) == 0


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
@drawn
@given(length=st.integers(8000, 20_000), seed=st.integers(0, 99))
def test_samples_depend_on_their_number_alone(
    task: Task, length: int, seed: int
) -> None:
    tokenizer = Characters()
    samples = task.make(tokenizer, length, 3, seed)
    fresh = make_tasks()[task.name]
    assert samples[:2] == fresh.make(tokenizer, length, 2, seed)
    assert len({sample.context for sample in samples}) == 3
    assert samples[0].context != task.make(tokenizer, length, 1, seed + 1)[0].context
    assert task.make(tokenizer, length, 0, seed) == []


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_smallest_length_is_named(task: Task, tokenizer) -> None:
    with pytest.raises(ToolError, match=rf"^{task.name}: 50 tokens are too few") as no:
        task.make(tokenizer, 50, 4, seed=1)
    smallest = int(str(no.value).split()[-1])
    samples = task.make(tokenizer, smallest, 4, seed=1)
    lengths = [tokens(tokenizer, prompt(sample)) for sample in samples]
    assert max(lengths) == smallest
    for sample in samples:
        assert solve(task.name, prompt(sample)) == set(sample.answers)
    with pytest.raises(ToolError, match=f"{smallest - 1} tokens are too few"):
        task.make(tokenizer, smallest - 1, 4, seed=1)


def haystack_of(sample: Sample) -> str:
    """The text that the needle's depth is a share of."""
    if sample.task == "vt":
        return assignments(sample.context)
    return sample.context


def asked_at(sample: Sample) -> int:
    """The character at which the first asked needle begins in its text."""
    text, answer = haystack_of(sample), sample.answers[0]
    if sample.task == "qa":
        (name,) = re.findall(r"[A-Z][a-z]+ [A-Z][a-z]+", sample.question[-80:])
        return text.index(f":\n{name}\n")
    return text.index(answer)


@pytest.mark.parametrize(
    "haystack, name",
    [*(("noise", name) for name in NEEDLES), ("essay", "niah_single"), ("essay", "vt")],
)
@drawn
@example(depth=0.0)
@example(depth=1.0)
@given(depth=st.floats(0, 1))
def test_depth(haystack: str, name: str, tokenizer, depth: float) -> None:
    task = make_tasks(haystack)[name]
    samples = task.make(tokenizer, 3000, 1, seed=3, depth=depth)
    for sample, free in zip(samples, task.make(tokenizer, 3000, 1, 3), strict=True):
        assert sample.depth == depth and 0 <= free.depth <= 1
        # The same question is asked at every depth.
        assert (sample.question, sample.answers) == (free.question, free.answers)
        text = haystack_of(sample)
        before = tokens(tokenizer, text[: asked_at(sample)])
        room = tokens(tokenizer, text) - (600 if name == "needle" else 0)
        # Half a unit, the words before the answer and the other needles; documents of
        # a question are long units.
        within = 0.1 if name == "qa" else 0.06
        assert before / room == pytest.approx(depth, abs=within)


@pytest.mark.parametrize("name", NEEDLES)
def test_needles_lie_anywhere(name: str) -> None:
    samples = TASKS[name].make(Characters(), 10_000, 40, seed=0)
    depths = sorted(sample.depth for sample in samples if sample.depth is not None)
    assert len(set(depths)) > 20
    # The first of five assignments is seldom late; needles keep out of the end.
    assert depths[0] < 0.1 and depths[-1] > (0.4 if name in ("vt", "needle") else 0.8)
    for sample in samples:
        at = asked_at(sample) / len(haystack_of(sample))
        assert sample.depth == pytest.approx(at, abs=0.06)


@pytest.mark.parametrize("name", ["cwe", "fwe"])
def test_what_lies_everywhere_has_no_depth(name: str, tokenizer) -> None:
    with pytest.raises(ToolError, match=f"{name} has no depth"):
        TASKS[name].make(tokenizer, 2000, 1, seed=0, depth=0.5)
    with pytest.raises(ToolError, match="from 0 to 1, not 50"):
        TASKS["vt"].make(tokenizer, 2000, 1, seed=0, depth=50)


def test_distractors(tokenizer) -> None:
    def made(name: str) -> tuple[list[tuple[str, str]], Sample]:
        (sample,) = TASKS[name].make(tokenizer, 3000, 1, seed=5)
        return FACT.findall(prompt(sample)), sample

    for name, keys, values in [
        ("niah_single", 1, 1),
        ("niah_multikey", 4, 4),
        ("niah_multivalue", 1, 4),
        ("niah_multiquery", 4, 4),
    ]:
        facts, sample = made(name)
        assert len({key for key, _ in facts}) == keys
        assert len({value for _, value in facts}) == len(facts) == values
        assert all(re.fullmatch(r"\d{7}", value) for _, value in facts)
        assert all(re.fullmatch(r"\S+?-.+", key) for key, _ in facts)
    uuid = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-\w{12}")
    facts, sample = made("niah_multikey_3")
    assert all(uuid.fullmatch(word) for fact in facts for word in fact)
    for name in ("niah_multikey_2", "niah_multikey_3"):
        facts, sample = made(name)
        assert len({key for key, _ in facts}) == len(facts) > 20
        # Nothing else is in the text.
        intro, *lines = sample.context.splitlines()
        assert len(lines) == len(facts)


def test_frequencies_are_rulers(tokenizer) -> None:
    for length, often, seldom in [(2000, 6, 1), (4096, 30, 3)]:
        (sample,) = TASKS["cwe"].make(tokenizer, length, 1, seed=0)
        counts = word_list(prompt(sample))
        assert {counts.pop(word) for word in sample.answers} == {often}
        assert set(counts.values()) == {seldom}
    (sample,) = TASKS["fwe"].make(tokenizer, 6000, 1, seed=0)
    counts = coded_words(prompt(sample))
    most = [count for _, count in counts.most_common(3)]
    assert most[0] / most[1] == pytest.approx((3 / 2) ** 2, rel=0.05)
    assert most[0] / most[2] == pytest.approx((4 / 2) ** 2, rel=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_needle_asks_the_same_at_every_depth(seed: int) -> None:
    made = [
        TASKS["needle"].make(Characters(), 3000, 1, seed, depth=tenths / 10)[0]
        for tenths in range(11)
    ]
    assert len({(sample.question, sample.answers) for sample in made}) == 1
    at = [asked_at(sample) for sample in made]
    assert at == sorted(at) and at[0] < 100


def test_needle_on_the_bundled_tokenizer(bundled) -> None:
    task = TASKS["needle"]
    for length in (400, 1000, 1001, 4096):
        for sample in task.make(bundled, length, 4, seed=0):
            assert tokens(bundled, prompt(sample)) == length
            assert solve("needle", prompt(sample)) == set(sample.answers)
            assert bundled.unk_token_id not in bundled.encode(prompt(sample))
            assert re.fullmatch(r" recall \w+", sample.question)
            if length >= 1000:
                end = bundled.decode(bundled.encode(sample.context)[-598:])
                assert "remember" not in end


def test_haystack_of_a_file(tmp_path: Path, tokenizer) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Grüße aus Köln! One more.\n\nNo end " + "x" * 1000, "utf-8")
    (sample,) = make_tasks(str(file))["niah_single"].make(tokenizer, 3000, 1, seed=0)
    assert solve("niah_single", prompt(sample)) == set(sample.answers)
    assert "Grüße aus Köln! One more. No end xx" in sample.context
    assert sample.context.count("Grüße") > 1  # begins anew where it ends


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file or directory; give noise, essay or a text file"),
        (b" \n ", "there is no text in it"),
        (b"\xff\xfe\x00", "not a text file in UTF-8"),
    ],
)
def test_haystack_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ToolError) as refused:
        make_tasks(str(file))
    assert str(refused.value) == f"haystack {file}: {message}"


def test_questions_of_a_file(squad: Path, tokenizer) -> None:
    task = make_tasks(qa_file=squad)["qa"]
    for sample in task.make(tokenizer, 1000, 5, seed=0):
        (item,) = re.findall(r"How heavy is item (\S+)\?", sample.question)
        texts = documents(sample.context)
        assert sample.answers == (
            f"{int(item.split('-')[0]) * 10 + int(item.split('-')[1])} grams",
        )
        # The whole article is there, and nothing twice.
        assert len(set(texts)) == len(texts)
        article = item.split("-")[0]
        assert sum(f"Item {article}-" in text for text in texts) == 4
    with pytest.raises(ToolError, match=r"qa: its documents end at \d+ of 100000"):
        task.make(tokenizer, 100_000, 1, seed=0)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file or directory"),
        ("{", "not in SQuAD's JSON format: Invalid JSON: "),
        ("[]", "not in SQuAD's JSON format: Input should be an object"),
        ('{"data": [{}]}', "not in SQuAD's JSON format: data.0.paragraphs: Field req"),
        (
            '{"data": [{"paragraphs": [{"context": "", "qas": [{"question": "", '
            '"answers": [{"text": ""}]}]}]}]}',
            "not in SQuAD's JSON format: data.0.paragraphs.0.qas.0.answers.0.text: Str",
        ),
        ('{"data": []}', "none in it has an answer"),
    ],
)
def test_questions_refused(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "squad.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ToolError) as refused:
        make_tasks(qa_file=file)
    assert str(refused.value).startswith(f"questions {file}: {message}")
    assert "\n" not in str(refused.value)


@given(
    sizes=st.lists(st.integers(1, 50) | st.just(5), min_size=2, max_size=300),
    length=st.integers(0, 3000),
    ends=st.booleans(),
)
def test_fit(sizes: list[int], length: int, ends: bool) -> None:
    looked: list[int] = []

    def used(units: int) -> int:
        looked.append(units)
        whole, rest = divmod(units, len(sizes))
        return 40 + whole * sum(sizes) + sum(sizes[:rest])

    length += used(1)
    most = len(sizes) if ends else None
    units, tokens = fit(used, length, least=1, most=most)
    assert tokens == used(units) <= length
    assert 1 <= units <= (most or units)
    assert units == most or length - tokens <= max(sizes)
    assert len(looked) < 25


def test_long_prompts_are_seldom_tokenized() -> None:
    class Counting:
        looked = 0

        def encode(self, text: str) -> str:
            self.looked += len(text)
            return text

    for task in TASKS.values():
        tokenizer = Counting()
        task.make(tokenizer, 100_000, 3, seed=0)
        assert tokenizer.looked < 3 * 100_000 * 5, task.name
