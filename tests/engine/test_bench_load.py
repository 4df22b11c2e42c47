"""`kvcompress bench serve` and `throughput` through vLLM's own commands."""

import json
from pathlib import Path

import pytest

from vllm_kvcompress.tools.main import main

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(3600)]

SPEED = {"request_throughput", "output_throughput", "total_token_throughput"}
LATENCY = {
    f"{what}_{name}_ms"
    for what in ("mean", "median", "p99")
    for name in ("ttft", "tpot")
}
OURS = {
    *("kind", "arm", "method", "dataset", "input_len", "output_len", "failed"),
    *("request_rate", "max_concurrency", "total_input_tokens", "total_output_tokens"),
    *("preemptions", "kv_usage_peak", "running_peak", "compressions"),
}
LABELS = ["stock", "snapkv budget=256"]
FLAGS = [
    *("--budgets", "256", "--no-fp8", "--kv-space", "0.02", "--warmups", "1"),
    *("--engine", '{"enforce_eager": true}', "--num-prompts", "4"),
]


def runs(folder: Path) -> list[dict]:
    (file,) = folder.glob("*/runs.jsonl")
    for name in ("config.json", "environment.json"):
        assert json.loads(file.with_name(name).read_text())
    return [json.loads(line) for line in file.read_text().splitlines()]


def check_compression(found: list[dict]) -> None:
    for run in found:
        assert run["completed"] == 4
        assert run["failed"] == 0
        assert 0 < run["kv_usage_peak"] <= 1
        assert run["running_peak"] > 0
        assert (run["compressions"] > 0) == (run["arm"] != "stock")


def test_serve(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("trace.csv").write_text("input_len,output_len\n600,300\n500,350\n")
    command = ["bench", "serve", "--request-rates", "2,inf", *FLAGS]
    command += ["--lengths-from", "trace.csv", "--out", "out"]
    assert main(command) == 0
    found = runs(tmp_path / "out")
    loads = [(run["arm"], run["request_rate"]) for run in found]
    assert loads == [(label, rate) for label in LABELS for rate in (2.0, "inf")]
    for run in found:
        assert run.keys() >= SPEED | LATENCY | OURS
        assert run["prefix_cache_hits"] == 0
    assert len({run["total_input_tokens"] for run in found}) == 1
    assert len({run["total_output_tokens"] for run in found}) == 1
    check_compression(found)
    assert "snapkv budget=256 against stock: wins in" in capsys.readouterr().out
    assert main(command) == 0  # all of it is done
    assert runs(tmp_path / "out") == found


def test_throughput(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    lengths = ["--input-len", "600", "--output-len", "300", "--range-ratio", "0.2"]
    assert main(["bench", "throughput", *FLAGS, *lengths, "--out", "out"]) == 0
    found = runs(tmp_path / "out")
    assert [run["arm"] for run in found] == LABELS
    for run in found:
        assert SPEED | OURS | {"requests_per_second", "elapsed_time"} <= run.keys()
    check_compression(found)
    assert "rate inf" in capsys.readouterr().out


def test_a_server_that_dies_says_why_in_one_line(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bad = ["--engine", '{"no_such_thing": 1}', "--no-fp8", "--out", "out"]
    assert main(["bench", "serve", *bad]) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    (line,) = told
    assert "stock: the server does not start: " in line
    assert "unrecognized arguments: --no-such-thing 1 (log: out/" in line
