"""Plan, questions, folders, arithmetic, tables and errors of `kvcompress eval`."""

import http.server
import io
import json
import math
import re
import socket
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from rich.console import Console
from transformers import AutoTokenizer

from vllm_kvcompress.methods import METHODS
from vllm_kvcompress.tools.errors import ToolError
from vllm_kvcompress.tools.eval import harness
from vllm_kvcompress.tools.eval.conversation import (
    Answer,
    Question,
    Reference,
    Rules,
    converse,
)
from vllm_kvcompress.tools.eval.engine import Engine
from vllm_kvcompress.tools.eval.fidelity import (
    Fidelity,
    agrees,
    coarse_kl,
    fidelity,
    pooled,
)
from vllm_kvcompress.tools.eval.folder import Folder
from vllm_kvcompress.tools.eval.harness import HarnessRunner, summary
from vllm_kvcompress.tools.eval.metrics import KV_COUNTERS, arm_config, metrics
from vllm_kvcompress.tools.eval.plan import (
    BUNDLED_OWN_SETTINGS,
    OWN_SETTINGS,
    Arm,
    plan,
    sizes,
)
from vllm_kvcompress.tools.eval.questions import as_question, make_items
from vllm_kvcompress.tools.eval.table import tables
from vllm_kvcompress.tools.eval.tasks import TASKS, Sample
from vllm_kvcompress.tools.main import main
from vllm_kvcompress.tools.needle import model_path

COMMON = {
    "model": "m",
    "question": "inside",
    "target": "vllm",
    "tasks": ["needle"],
    "lengths": [512],
    "depths": None,
    "samples": 2,
    "seed": 0,
    "fidelity": "forced",
    "engine": {},
}


# Arms


def test_stock_runs_first_and_every_method_at_every_budget():
    made = plan(list(METHODS), sizes([64, 256], None), block_size=32)
    assert made.skipped == []
    stock, *rest = made.arms
    assert stock.label == "stock" and stock.settings is None
    owning = set(OWN_SETTINGS)
    own = sum(map(len, OWN_SETTINGS.values()))
    assert len(rest) == 2 * (len(METHODS) - len(owning)) + own
    snapkv = next(arm for arm in rest if arm.method == "snapkv")
    assert snapkv.settings == {"method": "snapkv", "budget": 64}
    assert snapkv.label == "snapkv budget=64"
    merged = plan(["minicache"], [{}], own=BUNDLED_OWN_SETTINGS).arms[1:]
    assert all(arm.own["start_layer"] == 0 for arm in merged)


def test_budgets_that_a_method_cannot_use_are_skipped_and_named():
    made = plan(["snapkv", "knorm"], sizes([32, 62, 63], None), block_size=32)
    labels = [arm.label for arm in made.arms]
    assert labels == ["stock", "snapkv budget=63", *(f"knorm budget={b}" for b in B)]
    assert made.skipped == [
        "snapkv needs a budget of at least 63 with KV blocks of 32 tokens; "
        "skipped: 32, 62"
    ]


B = [32, 62, 63]


def test_common_settings_are_for_all_methods_that_take_them():
    common = {"decode": {"interval": 64}}
    _, arm = plan(["knorm"], sizes(None, [0.5]), common=common).arms
    assert arm.settings == {"method": "knorm", "keep_ratio": 0.5, **common}
    made = plan(["pyramidinfer"], sizes([128], None), common={"prefill_interval": 0})
    assert [arm.method for arm in made.arms] == ["stock"]
    assert "prefill_interval" in made.skipped[0]


def test_a_size_in_the_common_settings_is_the_only_one():
    common = {"layer_budgets": [64, 96]}
    assert len(plan(["knorm"], [{}], common=common).arms) == 2
    with pytest.raises(ToolError, match="--config says layer_budgets; drop --budgets"):
        plan(["knorm"], sizes([64], None), common=common)


# Questions


def test_question_is_cut_off_where_it_begins():
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    (item,) = make_items(
        tokenizer,
        [TASKS["needle"]],
        lengths=[512],
        depths=[0.5],
        samples=1,
        seed=0,
        outside=True,
    )
    inside = as_question(tokenizer, item.sample, outside=False)
    assert len(inside.prompt) == 512 and inside.question == []
    assert item.asked.prompt + item.asked.question == inside.prompt
    assert tokenizer.decode(item.asked.question) == item.sample.question.strip()
    assert item.key == ("needle", 512, 0) and item.depth == 0.5


def test_a_token_with_text_of_both_sides_belongs_to_the_question():
    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split(" ")]}

    sample = Sample("t", "a bb cc", "c dddd", (), None, 9, 1)
    assert as_question(tokenizer, sample, outside=True) == Question([1, 2], [3, 4], 1)


def test_tasks_without_depth_are_asked_once():
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    asked: dict[str, Any] = {"lengths": [512], "samples": 2, "seed": 0}
    every = [0.0, 0.5, 1.0]
    items = make_items(
        tokenizer, [TASKS["needle"]], depths=every, outside=False, **asked
    )
    assert [item.key[2] for item in items] == list(range(6))
    assert [item.depth for item in items] == [d for d in every for _ in range(2)]
    assert not TASKS["cwe"].has_depth


# Conversation


def spoken(
    rules: Rules, reference: Reference | None, *answers: Answer, question: list[int]
) -> tuple[list[Any], dict[str, Any]]:
    """The requests of a conversation with these answers, and its outcome."""
    talk = converse(Question([1, 2], question, 3), rules, reference)
    requests = [next(talk)]
    try:
        for answer in answers:
            requests.append(talk.send(answer))
    except StopIteration as end:
        return requests, end.value
    raise AssertionError("it has not come to an end")


def sure(tokens: list[int]) -> list[dict[int, float]]:
    return [{token: 0.0, 99: -30.0} for token in tokens]


def test_stocks_answer_begins_behind_the_question_and_is_the_reference():
    answer = Answer([7, 8, 4, 5, 6], sure([7, 8, 4, 5, 6]), "length")
    (request,), outcome = spoken(Rules(2, True), None, answer, question=[7, 8])
    assert (request.forced, request.max_tokens) == ([7, 8], 5)
    assert outcome["tokens"] == [4, 5, 6]
    assert outcome["reference"] == {"tokens": [4, 5], "top": sure([4, 5])}


def test_stop_tokens_in_a_question_do_not_end_it_but_those_behind_do():
    rules = Rules(0, True, stop_tokens=[2])
    answer = Answer([7, 2, 4, 2, 6], [], "length")
    (request,), outcome = spoken(rules, None, answer, question=[7, 2])
    assert request.ignore_eos and request.logprobs is None
    assert outcome == {"tokens": [4, 2], "finish_reason": "stop"}


def test_an_answer_like_stocks_needs_no_second_request():
    reference = Reference([4, 5], sure([4, 5]))
    answer = Answer([4, 5, 6], sure([4, 5, 6]), "stop")
    requests, outcome = spoken(Rules(2, True), reference, answer, question=[])
    assert len(requests) == 1
    assert outcome["fidelity"] == {"agreement": 1.0, "kl": 0.0, "tokens": 2}


def test_an_answer_that_leaves_stocks_is_led_along_it():
    reference = Reference([4, 5, 6], sure([4, 5, 6]))
    own = Answer([9, 9, 9], sure([9, 9, 9]), "stop")
    led = Answer([7, 4, 5, 6], sure([7, 9, 5, 6]), "length")
    requests, outcome = spoken(
        Rules(3, True), reference, Answer([7, *own.tokens], [{}, *own.top], "stop"),
        led, question=[7],
    )  # fmt: skip
    assert requests[1].forced == [7, 4, 5, 6]
    assert requests[1].ignore_eos and requests[1].max_tokens == 4
    assert outcome["tokens"] == own.tokens
    assert outcome["fidelity"]["agreement"] == pytest.approx(2 / 3)
    assert outcome["fidelity"]["tokens"] == 3


def test_without_forcing_the_comparison_ends_where_answers_part():
    reference = Reference([4, 5, 6], sure([4, 5, 6]))
    answer = Answer([4, 9, 6], sure([4, 9, 6]), "stop")
    requests, outcome = spoken(Rules(3, False), reference, answer, question=[])
    assert len(requests) == 1
    assert outcome["fidelity"]["tokens"] == 2
    assert outcome["fidelity"]["agreement"] == 0.5


# Fidelity

SIZE = 12
logits = arrays.arrays(np.float64, SIZE, elements=st.floats(-12, 12))


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.logaddexp.reduce(x)


def top(logprobs: np.ndarray, count: int) -> dict[int, float]:
    best = np.argsort(-logprobs, kind="stable")[:count]
    return {int(i): float(logprobs[i]) for i in best}


@given(logits, logits, st.integers(1, SIZE), st.integers(1, SIZE))
def test_coarse_kl_is_a_lower_bound_and_exact_where_all_is_named(one, other, k, m):
    p, q = log_softmax(one), log_softmax(other)
    dense = float(np.sum(np.exp(p) * (p - q)))
    coarse = coarse_kl(top(p, k), top(q, m))
    assert -1e-12 <= coarse <= dense + 1e-6
    assert coarse_kl(top(p, SIZE), top(q, SIZE)) == pytest.approx(dense, abs=1e-6)
    assert coarse_kl(top(p, k), top(p, k)) == 0


def test_coarse_kl_of_lists_that_share_nothing_is_that_of_nothing_known():
    assert coarse_kl({1: math.log(0.6)}, {2: math.log(0.9)}) == 0


def test_agreement_is_about_the_most_likely_token_and_ties_are_kind():
    assert agrees(1, {1: -0.5, 2: -0.5})
    assert not agrees(1, {1: -0.6, 2: -0.5})
    assert not agrees(3, {1: -0.6})


def test_positions_are_averaged_as_far_as_both_go():
    found = fidelity([1, 2], sure([1, 2]), sure([1, 3])[:1])
    assert found == Fidelity(1.0, 0.0, 1)
    assert fidelity([1], [], sure([1])) is None
    assert pooled([Fidelity(1, 0, 3), Fidelity(0, 4, 1)]) == Fidelity(0.75, 1, 4)
    assert pooled([]) is None


# Folder


def line(sample: int, **more: Any) -> dict[str, Any]:
    return {
        "task": "needle",
        "length": 512,
        "sample": sample,
        "depth": 0.5,
        "score": 1.0,
        "fidelity": None,
        **more,
    }


def test_folder_is_named_by_its_configuration_and_continued(tmp_path):
    config = arm_config(Arm("snapkv", {"budget": 256}), COMMON)
    with Folder(tmp_path, config) as folder:
        folder.append([line(0), line(1)], [line(0, tokens=[1], top=[])])
        path = folder.path
    assert re.fullmatch(r"needle-snapkv-budget=256-[0-9a-f]{8}", path.name)
    with (path / "predictions.jsonl").open("a") as file:
        file.write('{"task": "needle", "leng')
    with Folder(tmp_path, config) as folder:
        assert folder.predictions == [line(0), line(1)]
        assert folder.references == {("needle", 512, 0): line(0, tokens=[1], top=[])}
        folder.append([line(2)], [])
    written = (path / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(each) for each in written] == [line(0), line(1), line(2)]


def test_arms_that_answer_the_same_questions_share_a_group():
    stock, snapkv = (arm_config(Arm(name), COMMON) for name in ("stock", "snapkv"))
    assert stock["group"] == snapkv["group"]
    assert stock["group"] != arm_config(Arm("stock"), {**COMMON, "seed": 1})["group"]


def test_a_folder_of_another_configuration_is_refused(tmp_path):
    config = arm_config(Arm("stock"), COMMON)
    with Folder(tmp_path, config) as folder:
        path = folder.path
    changed = json.loads((path / "config.json").read_text()) | {"seed": 5}
    (path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ToolError, match="config.json differs from what is asked for"):
        Folder(tmp_path, config)


def test_a_folder_is_written_by_one_run_at_a_time(tmp_path):
    config = arm_config(Arm("stock"), COMMON)
    with (
        Folder(tmp_path, config),
        pytest.raises(ToolError, match="is being written by another run"),
    ):
        Folder(tmp_path, config)
    Folder(tmp_path, config)


def test_damaged_files_are_named(tmp_path):
    config = arm_config(Arm("stock"), COMMON)
    with Folder(tmp_path, config) as folder:
        path = folder.path
    (path / "predictions.jsonl").write_text("nonsense\n")
    with pytest.raises(ToolError, match="predictions.jsonl is damaged"):
        Folder(tmp_path, config)


# Metrics and tables


def counted(**changes: int) -> dict[str, int]:
    return {**dict.fromkeys(KV_COUNTERS, 0), **changes}


def test_metrics_add_up_waves_and_cells():
    near = {"agreement": 0.5, "kl": 1.0, "tokens": 2}
    kv = counted(compressions=2, logical_tokens=100, retained_tokens=25)
    lines = [
        line(0, wave={"seconds": 1.5, "kv": kv}, fidelity=near),
        line(1, depth=0.0, score=0.0),
        line(2, wave={"seconds": 1.0, "kv": kv}, task="vt"),
    ]
    found = metrics(lines, expected=4, by_depth=True)
    assert not found["complete"] and found["samples"] == 3
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["by_task"]["needle"] == {
        "accuracy": 0.5,
        "samples": 2,
        "fidelity": near,
    }
    assert found["kv"]["kept_share"] == 0.25 and found["kv"]["compressions"] == 4
    assert found["seconds"] == 2.5
    assert [(c["task"], c["depth"], c["accuracy"]) for c in found["cells"]] == [
        ("needle", 0.5, 1.0),
        ("needle", 0.0, 0.0),
        ("vt", 0.5, 1.0),
    ]
    whole = metrics(lines, expected=3, by_depth=False)
    assert whole["complete"] and [c["depth"] for c in whole["cells"]] == [None, None]


def printed(arms: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    output = io.StringIO()
    for table in tables(arms):
        Console(width=100, file=output).print(table)
    return output.getvalue()


def test_table_has_stock_and_all_arms_task_by_task():
    kv = counted(compressions=2, logical_tokens=100, retained_tokens=25)
    near = {"agreement": 0.5, "kl": 1.25, "tokens": 2}
    stock = metrics([line(0), line(1), line(2, task="vt")], 3, False)
    cut = metrics(
        [line(0, wave={"seconds": 1, "kv": kv}, fidelity=near), line(1, score=0.0)],
        3,
        False,
    )
    idle = metrics([line(0, wave={"seconds": 1, "kv": counted()})], 1, False)
    text = printed(
        [
            (arm_config(Arm("stock"), COMMON), stock),
            (arm_config(Arm("snapkv", {"budget": 8}), COMMON), cut),
            (arm_config(Arm("knorm", {"budget": 999}), COMMON), idle),
        ]
    )
    needle, vt = text.split("vt: ")
    assert "needle: 2 samples of 512 tokens, question inside the compressed" in needle
    lines = [row.split("│") for row in needle.splitlines() if row.startswith("│")]
    rows = {row[1].strip(): [cell.strip() for cell in row[2:-1]] for row in lines}
    assert rows["stock"] == ["100.0%", "1.00", "100.0%", "-", "-"]
    assert rows["snapkv budget=8"] == ["50.0%", "0.50", "25.0%", "50.0%", "1.2500"]
    assert rows["knorm budget=999"][2] == "nothing compressed"
    assert "snapkv" not in vt and "lower bound" in vt


def test_table_says_when_the_comparison_ends_early():
    common = {**COMMON, "fidelity": "prefix", "question": "outside"}
    arms = [(arm_config(Arm("stock"), common), metrics([line(0)], 1, False))]
    text = " ".join(printed(arms).split())
    assert "question outside the compressed prompt" in text
    assert "up to where the answers part" in text


# lm-evaluation-harness


def test_harness_gets_the_arms_settings_as_keywords(tmp_path):
    engine = Engine({"model": "M", "block_size": 32}, batch=4)
    runner = HarnessRunner(tmp_path, COMMON, {}, "lm_eval:arc_easy", engine)
    job = runner.job(Arm("snapkv", {"budget": 256}), tmp_path)
    assert job["model"] == "vllm" and job["tasks"] == ["arc_easy"]
    assert job["limit"] == 2 and job["seed"] == [0] * 4
    assert job["model_args"] == {
        "pretrained": "M",
        "block_size": 32,
        "additional_config": {"kv_compression": {"method": "snapkv", "budget": 256}},
    }
    assert runner.job(Arm("stock"), tmp_path)["model_args"] == {
        "pretrained": "M",
        "block_size": 32,
    }


def test_harness_results_become_metrics():
    results = {
        "results": {
            "a": {"alias": "a", "f1,none": 0.5, "f1_stderr,none": 0.1},
            "b": {"alias": "b", "acc,none": 1.0, "acc_norm,none": 0.0},
            "group": {"alias": "g", "acc,none": 0.7},
        },
        "n-samples": {
            "a": {"original": 9, "effective": 3},
            "b": {"original": 9, "effective": 1},
        },
    }
    found = summary(results, 2.0)
    assert found["accuracy"] == (0.5 * 3 + 1.0) / 4 and found["samples"] == 4
    assert found["by_task"]["b"]["metric"] == "acc"
    with pytest.raises(ToolError, match="no score"):
        summary({"results": {}, "n-samples": {}}, 0)


def test_harness_failures_are_one_line():
    log = """Traceback (most recent call last):
      File "x.py", line 1
    ConnectionError: Couldn't reach 'x/y' on the Hub (OfflineModeIsEnabled)
    resource_tracker: There appear to be 1 leaked objects
    """
    assert harness.reason(log).startswith("ConnectionError: Couldn't reach")
    assert harness.reason("killed\n") == "killed"
    assert harness.reason("") == "it printed nothing"


# Bad input


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a failing command prints."""
    assert main(["eval", *arguments]) != 0
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert text.startswith("kvcompress eval: error: ")
    return text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--methods nope", "method is 'nope'; allowed values: snapkv"),
        ("--tasks nope", "unknown task 'nope'; allowed values: niah_single"),
        ("--tasks ,", "unknown task ''"),
        ("--budgets 64,x", "'64,x' is not a list of numbers such as 64,"),
        ("--budgets 0", "0 is not at least 1"),
        ("--lengths 0", "0 is not at least 1"),
        ("--lengths", "expected one argument"),
        ("--depths 101", "101 is not between 0 and 100 percent"),
        ("--keep-ratios 2", "2 is not between 0 and 1"),
        ("--budgets 64 --keep-ratios 0.5", "not allowed with argument"),
        ("--samples 0", "0 is not at least 1"),
        ("--fidelity-tokens -1", "-1 is below 0"),
        ("--config []", "is not a JSON object"),
        ("--lengths 90", "needle: 90 tokens are too few"),
        ("--model /nowhere", "no tokenizer of '/nowhere'"),
        ("--stock-url localhost", "--stock-url needs --url"),
        ("--url localhost --keep-ratios 0.5", "--keep-ratios says how an engine is"),
        ("--url ftp://x", "'ftp://x' is no address of a server"),
        ("--out /dev/null/x", "--out /dev/null/x cannot be written"),
    ],
)
def test_bad_arguments_are_one_line_and_not_zero(arguments, message, capsys, tmp_path):
    out = () if "--out" in arguments else ("--out", str(tmp_path))
    assert message in complaint(capsys, *arguments.split(), *out)


def test_missing_harness_is_named(monkeypatch, capsys):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    text = complaint(capsys, "--tasks", "longbench")
    assert "longbench needs lm-evaluation-harness; pip install 'lm-eval" in text


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers everything alike."""

    status, body = 500, b"oops"

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(params=[(500, b"oops"), (200, b"<html>"), (200, b"[]")], ids=str)
def wrong_server(request):
    """The address of something else than vLLM, and what it does."""
    status, body = request.param
    handler = type("Handler", (Refusing,), {"status": status, "body": body})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", request.param
    server.shutdown()


def test_servers_that_are_none_of_vllm_are_named(wrong_server, capsys):
    url, what = wrong_server
    messages = {
        (500, b"oops"): "answered 500: Internal Server Error",
        (200, b"<html>"): "answered, but not with JSON",
        (200, b"[]"): "is no OpenAI-compatible server",
    }
    assert f"{url}" in (text := complaint(capsys, "--url", url))
    assert messages[what] in text


def test_a_server_that_is_not_there_is_named(capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    assert f"{url} does not answer: " in complaint(capsys, "--url", url)
