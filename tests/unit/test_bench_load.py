"""`kvcompress bench serve` and `throughput` without an engine."""

import io
import json
import socket
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from vllm_kvcompress.config import KEY
from vllm_kvcompress.plan import Counters
from vllm_kvcompress.tools.bench.load import server as servers
from vllm_kvcompress.tools.bench.load.arms import FP8, STOCK, Arm, plan_arms
from vllm_kvcompress.tools.bench.load.folder import RUNS, ResultFolder
from vllm_kvcompress.tools.bench.load.judgement import change, verdict
from vllm_kvcompress.tools.bench.load.lengths import draw, read_lengths, timed_trace
from vllm_kvcompress.tools.bench.load.points import Point, points
from vllm_kvcompress.tools.bench.load.report import load_table, sentences
from vllm_kvcompress.tools.bench.load.vllm_command import flags, last_words, process
from vllm_kvcompress.tools.bench.load.watch import COUNTED, Watch
from vllm_kvcompress.tools.errors import ToolError
from vllm_kvcompress.tools.main import main
from vllm_kvcompress.tools.scrape import read_metrics

ENVIRONMENT = {"vllm": "0.32.0", "cpu": "one"}


def test_keywords_become_the_flags_that_vllm_knows():
    keywords = {
        "max_model_len": 2048,
        "enforce_eager": True,
        "self_timed": False,
        "kv_cache_memory_bytes": None,
        "additional_config": {KEY: {"method": "snapkv"}},
    }
    assert flags(keywords) == [
        *("--max-model-len", "2048", "--enforce-eager", "--no-self-timed"),
        *("--additional-config", '{"kv_compression": {"method": "snapkv"}}'),
    ]


def test_arms_are_stock_fp8_and_every_method_at_every_budget():
    arms = plan_arms(["snapkv", "pyramidinfer"], [128, 256], "{}", fp8=True)
    assert [arm.label for arm in arms] == [
        *(STOCK, FP8, "snapkv budget=128", "snapkv budget=256", "pyramidinfer")
    ]
    told = arms[3].keywords["additional_config"][KEY]
    assert (told["method"], told["budget"]) == ("snapkv", 256)
    (_, ratio) = plan_arms(["snapkv"], [], '{"keep_ratio": 0.5}', fp8=False)
    assert ratio.label == "snapkv keep_ratio=0.5"
    (_, default) = plan_arms(["snapkv"], [], "{}", fp8=False)
    assert default.label == "snapkv budget=1024"


def test_an_arm_adds_to_the_keywords_of_all():
    arm = Arm("a", "snapkv", {"additional_config": {KEY: 1}})
    engine = arm.engine({"dtype": "float32", "additional_config": {"other": 2}})
    assert engine == {"dtype": "float32", "additional_config": {"other": 2, KEY: 1}}


def test_sweeps_over_rates_and_over_concurrencies():
    assert [str(each) for each in points(None, None)] == [
        *("rate 1", "rate 2", "rate 4", "rate inf")
    ]
    assert points(["inf"], [4]) == [Point(), Point(max_concurrency=4)]
    assert points(None, [1, 16]) == [Point("inf", 1), Point("inf", 16)]


@pytest.mark.parametrize(
    "text",
    [
        "900,20\n1000 , 30\n",
        "input_len,output_len\n900,20\n1000,30\n7,0\n",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17,900,20\nx,1000,30\n",
        "Timestamp,Model,Request tokens,Response tokens\n1,a,900,20\n2,b,1000,30\n",
        '{"timestamp": 1, "input_length": 900, "output_length": 20, "hash_ids": [1]}\n'
        '{"timestamp": 2, "input_length": 1000, "output_length": 30}\n\n',
    ],
    ids=["pairs", "own", "azure", "burstgpt", "mooncake"],
)
def test_recorded_lengths_are_read_as_traces_have_them(text, tmp_path: Path):
    file = tmp_path / "trace"
    file.write_text(text)
    assert read_lengths(file) == [(900, 20), (1000, 30)]


def test_a_trace_has_one_prompt_per_request_and_none_begins_like_another():
    drawn = draw([(900, 20), (1000, 30)], 50, seed=1)
    assert drawn == draw([(900, 20), (1000, 30)], 50, seed=1)
    assert set(drawn) == {(900, 20), (1000, 30)}
    rows = [json.loads(line) for line in timed_trace(drawn).splitlines()]
    assert [(row["input_length"], row["output_length"]) for row in rows] == drawn
    assert len({row["hash_ids"][0] for row in rows}) == 50


def run_record(arm: str, point: Point, **changes):
    return {
        "arm": arm,
        "request_throughput": 2.0,
        "output_throughput": 100.0,
        "median_ttft_ms": 50.0,
        "preemptions": 4.0,
        "kv_usage_peak": 0.9,
        "completed": 9,
        "failed": 0,
        "compressions": 3.0,
        **vars(point),
        **changes,
    }


def test_a_folder_is_taken_up_again_without_its_torn_line(tmp_path: Path):
    config, record = {"kind": "serve"}, run_record(STOCK, Point(2.0))
    folder = ResultFolder(tmp_path, "serve-small", config, ENVIRONMENT)
    folder.add(record)
    runs = folder.path / RUNS
    with runs.open("a") as file:
        file.write('{"arm": "sto')
    again = ResultFolder(tmp_path, "serve-small", config, ENVIRONMENT)
    assert again.path == folder.path
    assert again.records == [record]
    again.add(record)
    assert [json.loads(line) for line in runs.read_text().splitlines()] == [record] * 2
    other = ResultFolder(tmp_path, "serve-small", {"kind": "x"}, ENVIRONMENT)
    assert other.path != folder.path
    assert other.records == []


def test_a_folder_of_other_software_or_a_damaged_one_is_left_alone(tmp_path: Path):
    folder = ResultFolder(tmp_path, "serve", {}, ENVIRONMENT)
    with pytest.raises(ToolError, match=r"vllm 0\.32\.0, and this is 0\.33\.0"):
        ResultFolder(tmp_path, "serve", {}, {**ENVIRONMENT, "vllm": "0.33.0"})
    (folder.path / RUNS).write_text("{\n{}\n")
    with pytest.raises(ToolError, match="is damaged"):
        ResultFolder(tmp_path, "serve", {}, ENVIRONMENT)


def test_changes_are_judged_by_what_is_better():
    figures = ("request_throughput", "output_throughput", "median_ttft_ms")
    base = dict.fromkeys(figures, 50.0) | {"kv_usage_peak": 0.9, "preemptions": 4.0}
    run = base | {"request_throughput": 25.0, "median_ttft_ms": 25.0}
    run |= {"kv_usage_peak": 0.99, "preemptions": 0.0}
    told = {name: str(change(name, run, base)) for name in (*figures, "kv_usage_peak")}
    assert told == {
        "request_throughput": "0.50x LOST",
        "output_throughput": "1.00x",
        "median_ttft_ms": "0.50x",
        "kv_usage_peak": "1.10x",
    }
    assert change("median_ttft_ms", run, base).won is True
    assert change("kv_usage_peak", run, base).won is None
    assert str(change("preemptions", base, run)) == "- LOST"


def test_the_table_names_losses_and_the_sentence_sums_them_up():
    loads = [Point(2.0), Point()]
    arms = [Arm(STOCK), Arm(FP8), Arm("snapkv", "snapkv")]
    better = {"output_throughput": 150.0, "median_ttft_ms": 75.0}
    records = [run_record(arm.label, load) for arm in arms[:2] for load in loads]
    records += [run_record("snapkv", load, **better) for load in loads]
    console = Console(width=120, file=io.StringIO())
    console.print(load_table(loads[0], arms, records))
    shown = console.file.getvalue()
    assert shown.startswith("rate 2")
    for part in ("1.50x", "1.50x LOST", "1.50x fp8", "1.50x LOST fp8", "90%"):
        assert part in shown
    assert "p99" not in shown  # no run has it
    stock, told, to_fp8 = sentences(loads, arms, records)
    assert stock == "stock fp8 against stock: wins in nothing; loses in nothing."
    assert told == (
        "snapkv against stock: wins in output tokens/s (2 of 2, 1.50x); "
        "loses in median TTFT (2 of 2, 1.50x)."
    )
    assert to_fp8.startswith("snapkv against stock fp8: wins in output")


def test_an_arm_that_compressed_nothing_or_failed_requests_is_told():
    arm = Arm("snapkv", "snapkv")
    told = sentences(
        [Point()], [arm], [run_record("snapkv", Point(), compressions=0.0, failed=3)]
    )
    assert told[0] == "snapkv, rate inf: 3 of 12 requests failed."
    assert told[1].startswith("snapkv: nothing was compressed")


def test_one_load_is_not_counted():
    base, run = run_record(STOCK, Point()), run_record("a", Point(), preemptions=0.0)
    assert verdict([(run, base)]) == "wins in preemptions; loses in nothing."
    assert "loses in preemptions." in verdict([(base, run)])


def metrics(running: int, preemptions: int) -> str:
    labels = '{engine="0",model_name="m"}'
    return "\n".join(
        [
            "# TYPE vllm:num_requests_running gauge",
            f"vllm:num_requests_running{labels} {running}",
            "# TYPE vllm:kv_cache_usage_perc gauge",
            f"vllm:kv_cache_usage_perc{labels} {running / 10}",
            "# TYPE vllm:num_preemptions_total counter",
            f"vllm:num_preemptions_total{labels} {preemptions}",
            "",
        ]
    )


def test_a_watch_counts_what_happened_and_keeps_the_peaks():
    texts = iter([metrics(0, 5), metrics(7, 6)])
    with Watch(lambda: read_metrics(next(texts, metrics(1, 8)))) as watch:
        time.sleep(0.8)
    found = watch.figures()
    assert found["preemptions"] == 3
    assert found["running_peak"] == 7
    assert found["kv_usage_peak"] == 0.7
    assert set(COUNTED) - {"preemptions", "prefix_cache_hits"} <= set(vars(Counters()))


@pytest.mark.parametrize(
    ("log", "told"),
    [
        ("", "it said nothing"),
        ("one\ntwo\n\n", "two"),
        (
            "(EngineCore pid=7) ERROR 11-22 05:50:10 [core.py:1] a.b.ValueError: long\n"
            "(APIServer pid=8) RuntimeError: Engine core initialization failed. See\n"
            "[rank0]: a warning of others\n",
            "ValueError: long",
        ),
        ("usage: vllm\nvllm serve: error: no --x\n", "vllm serve: error: no --x"),
    ],
)
def test_the_last_words_are_the_reason(log, told, tmp_path: Path):
    (tmp_path / "log").write_text(log)
    assert last_words(tmp_path / "log") == told


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


def test_a_process_and_its_children_end_with_their_block(tmp_path: Path):
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    parent = f"""
import signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
subprocess.Popen([sys.executable, "-c", {child!r}]).wait()
"""
    log = tmp_path / "log"
    with process([sys.executable, "-c", parent], log, {}) as started:
        deadline = time.monotonic() + 60
        while not log.read_text().endswith("\n") and time.monotonic() < deadline:
            time.sleep(0.1)
        pid = int(log.read_text())
        assert alive(pid)
    assert started.returncode == 0
    deadline = time.monotonic() + 60
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(pid)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("serve --request-rates 1,no", "'1,no' is not a list of requests per second"),
        ("serve --request-rates 0", "'0' is not a list of requests per second"),
        ("serve --concurrencies 1,x", "'1,x' is not a list of numbers"),
        ("serve --dataset nope", "invalid choice: 'nope'"),
        ("serve --dataset sharegpt", "--dataset sharegpt needs --dataset-path FILE"),
        ("serve --dataset sharegpt --dataset-path no.json", "no.json cannot be read"),
        ("serve --dataset-path x.json", "--dataset-path needs --dataset"),
        ("serve --lengths-from no.csv", "--lengths-from no.csv cannot be read: No"),
        ("serve --lengths-from bad --input-len 9", "drop --dataset"),
        ("serve --lengths-from bad", "request 1 has no input and output length"),
        ("serve --dataset sharegpt --dataset-path bad", "is no ShareGPT file"),
        ("serve --dataset custom --dataset-path bad", "is no .jsonl file"),
        ("serve --range-ratio 1", "1 is not at least 0 and below 1"),
        ("serve --engine [1]", "[1] is not a JSON object"),
        ("serve --port 99999", "--port 99999 cannot be used: bind(): port must be"),
        ("serve --methods nope", "method is 'nope'; allowed values: snapkv"),
        ("serve --model ./no/such", "--model './no/such' cannot be read"),
        ("throughput --dataset custom", "invalid choice: 'custom'"),
        ("throughput --out bad/x", "bad/x"),
        ("", "required: WAY"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad").write_text("hello, world\nno, numbers\n")
    if "--out" in arguments:
        arguments += f" --model {servers.__file__.partition('tools')[0]}assets/needle"
    assert main(["bench", *arguments.split()]) != 0
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert printed.startswith("kvcompress bench")


def test_a_taken_port_is_one_sentence():
    with socket.socket() as taken:
        taken.bind((servers.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ToolError, match=f"--port {port} cannot be used: Address"):
            servers.choose_port(port)
    assert servers.choose_port(None) > 0


def test_a_missing_command_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["bench", "throughput"]) == 1
    assert "there is no `vllm` command beside" in capsys.readouterr().err
