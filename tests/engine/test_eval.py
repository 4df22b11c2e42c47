"""`kvcompress eval` through real vLLM, on the bundled model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vllm_kvcompress.tools.main import main
from vllm_kvcompress.tools.needle import model_path

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(1800)]

# Waves of two, so that a run can be stopped between them.
ASK = ["eval", *["--lengths", "1024", "--samples", "6", "--batch", "2"]]
INSIDE = [*ASK, *["--methods", "snapkv,keydiff,random", "--budgets", "128"]]

CASES = Path(__file__).with_name("forced_cases.py")

Metrics = dict[str, Any]


def read(out: Path) -> dict[str, Metrics]:
    """Metrics of all arms by label."""
    found = {}
    for folder in out.iterdir():
        config = json.loads((folder / "config.json").read_text())
        found[config["label"]] = json.loads((folder / "metrics.json").read_text())
    return found


def answers(out: Path, label: str) -> list[str]:
    """What an arm has answered."""
    (folder,) = out.glob(f"needle-{label}-*")
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line)["output"] for line in lines]


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results with the question inside the compressed prompt."""
    out = tmp_path_factory.mktemp("inside")
    assert main([*INSIDE, "--out", str(out)]) == 0
    return out


def test_arms_against_stock(inside: Path) -> None:
    arms = read(inside)
    stock, snapkv = arms["stock"], arms["snapkv budget=128"]
    assert stock["accuracy"] == snapkv["accuracy"] == 1
    assert stock["fidelity"] is None and stock["kv"]["kept_share"] == 1
    assert snapkv["fidelity"]["agreement"] == 1
    assert snapkv["kv"] == {
        "kept_share": 128 / 1024,
        "compressions": 6,
        "tokens_evicted": 6 * (1024 - 128),
        "blocks_freed": 6 * (1024 - 128) // 32,
    }
    floor = arms["random budget=128"]
    assert floor["accuracy"] < 0.5
    assert floor["fidelity"]["agreement"] < 1 < floor["fidelity"]["kl"]
    assert floor["fidelity"]["tokens"] == snapkv["fidelity"]["tokens"]


def test_a_finished_arm_is_not_run_again(inside: Path, capsys: Any) -> None:
    start = time.monotonic()
    assert main([*INSIDE, "--out", str(inside)]) == 0
    assert time.monotonic() - start < 60
    assert capsys.readouterr().err.count("was finished before") == 3


def test_a_budget_above_the_prompt_changes_nothing(inside: Path) -> None:
    large = [*ASK, *["--methods", "snapkv", "--budgets", "2048"]]
    assert main([*large, "--out", str(inside)]) == 0
    arm = read(inside)["snapkv budget=2048"]
    assert arm["kv"]["compressions"] == 0 and arm["kv"]["kept_share"] == 1
    assert arm["fidelity"]["agreement"] == 1
    assert arm["fidelity"]["kl"] < 1e-6


def test_a_killed_run_goes_on_where_it_was(inside: Path, tmp_path: Path) -> None:
    """With the same metrics in the end, time aside."""
    (stock,) = inside.glob("needle-stock-*")
    shutil.copytree(stock, tmp_path / stock.name)
    arm = [*ASK, *["--methods", "random", "--budgets", "128"], "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "vllm_kvcompress.tools.main", *arm]
    )
    try:
        while process.poll() is None and not (written := lines(tmp_path)):
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 0 < len(written) < 6
    torn = next(tmp_path.glob("needle-random-*/predictions.jsonl"))
    with torn.open("a") as file:
        file.write('{"task": "nee')
    assert main(arm) == 0
    assert lines(tmp_path)[: len(written)] == written
    found, whole = (read(out)["random budget=128"] for out in (tmp_path, inside))
    assert {**found, "seconds": 0} == {**whole, "seconds": 0}


def lines(out: Path) -> list[str]:
    """What is written of the answers of `random`, in whole lines."""
    for file in out.glob("needle-random-*/predictions.jsonl"):
        return [line for line in file.read_text().splitlines(True) if line[-1] == "\n"]
    return []


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_forced_tokens_are_generated_by_both_runners(
    runner: str, tmp_path: Path
) -> None:
    output = tmp_path / "answers.json"
    subprocess.run(
        [sys.executable, str(CASES), runner, model_path(), str(output)],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        check=True,
    )
    found = json.loads(output.read_text())
    first, again = found["answers"]
    for number, forced in enumerate(found["forced"]):
        made, count = first[str(number)], len(forced)
        # A stop token among them does not end it; behind them the model is free.
        assert made["tokens"][:count] == forced and len(made["tokens"]) == 6
        # Logprobs are the model's own: it would not have said this.
        assert made["own"] == [False] * count + [True] * (6 - count)
        assert again[str(number)] == made


def test_question_outside_is_not_seen_by_what_asks_queries(
    inside: Path, tmp_path: Path
) -> None:
    out = ["--question", "outside", "--out", str(tmp_path)]
    assert main([*ASK, *["--methods", "snapkv", "--budgets", "128"], *out]) == 0
    keydiff = [*ASK, *["--methods", "keydiff", "--budgets", "640"]]
    assert main([*keydiff, *out]) == main([*keydiff, "--out", str(inside)]) == 0
    arms = read(tmp_path)
    # Stock sees all of it, so that the question was really asked.
    assert arms["stock"]["accuracy"] == 1
    assert answers(tmp_path, "stock") == answers(inside, "stock")
    assert arms["snapkv budget=128"]["accuracy"] < 1
    label = "keydiff-budget=640"
    assert answers(tmp_path, label) == answers(inside, label)
    assert arms["keydiff budget=640"]["accuracy"] == 1
