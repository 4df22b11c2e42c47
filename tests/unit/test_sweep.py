"""The sweep's plan, table, file and plot, and its argument errors; no engine."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vllm_kvcompress.methods import METHODS
from vllm_kvcompress.tools import needle_run
from vllm_kvcompress.tools.arguments import budget_list
from vllm_kvcompress.tools.arms import ArmResult
from vllm_kvcompress.tools.errors import ToolError
from vllm_kvcompress.tools.main import main
from vllm_kvcompress.tools.needle_run import NeedleRun
from vllm_kvcompress.tools.sweep.plan import OWN_SETTINGS, kept_tokens, plan
from vllm_kvcompress.tools.sweep.report import curves, draw, sweep_table, table_rows

SIZES = {"prompt_len": 1024, "block_size": 32, "layers": 2}


def record(method: str, budget: int | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "method": method,
        "budget": budget,
        "parameters": {},
        "kept_tokens": 1024,
        "accuracy": 1.0,
        "kv_blocks_per_request": 33.0,
        **changes,
    }


RECORDS = [
    record("stock"),
    record("snapkv", 64, accuracy=0.75, kv_blocks_per_request=2.96),
    record("snapkv", 256, error="snapkv: the engine process died"),
    record("random", 256, accuracy=0.0, kv_blocks_per_request=9.0),
    record("random", 64, accuracy=0.0, kv_blocks_per_request=3.0),
    record(
        "pyramidinfer",
        parameters={"decay_ratio": 0.5},
        kept_tokens=832.0,
        accuracy=0.5,
        kv_blocks_per_request=27.0,
    ),
]


def test_stock_runs_first_and_every_method_at_every_budget():
    made = plan(list(METHODS), [64, 256], **SIZES)
    assert made.skipped == []
    stock, *rest = made.arms
    assert (stock.method, stock.budget, stock.kept_tokens) == ("stock", None, 1024)
    with_budget = [method for method in METHODS if method not in OWN_SETTINGS]
    own = sum(map(len, OWN_SETTINGS.values()))
    assert len(rest) == 2 * len(with_budget) + own
    assert [a.method for a in rest] == sorted(
        (a.method for a in rest), key=list(METHODS).index
    )
    for method, settings in OWN_SETTINGS.items():
        assert [a.parameters for a in rest if a.method == method] == settings
    snapkv = next(arm for arm in rest if arm.method == "snapkv")
    assert snapkv.settings == {"method": "snapkv", "budget": 64}
    assert snapkv.label == "snapkv budget=64"


def test_budgets_that_a_method_cannot_use_are_skipped_and_named():
    made = plan(["snapkv", "knorm"], [32, 62, 63], **SIZES)
    assert [arm.budget for arm in made.arms if arm.method == "snapkv"] == [63]
    assert [arm.budget for arm in made.arms if arm.method == "knorm"] == [32, 62, 63]
    assert made.skipped == [
        "snapkv needs a budget of at least 63 with KV blocks of 32 tokens; "
        "skipped: 32, 62"
    ]


def test_settings_that_keep_everything_are_skipped():
    made = plan(["pyramidinfer"], [64], prompt_len=128, block_size=128, layers=2)
    assert [arm.method for arm in made.arms] == ["stock"]
    assert (
        made.skipped[0] == "pyramidinfer decay_ratio=0.9 keeps whole prompts; skipped"
    )


def test_common_settings_are_for_all_methods_that_take_them() -> None:
    common = {"layer_budgets": [64, 96]}
    made = plan(["pyramidinfer", "knorm"], [128], **SIZES, common=common)
    assert [arm.method for arm in made.arms] == ["stock"]
    assert len(made.skipped) == 4 and "layer_budgets" in made.skipped[-1]
    common = {"decode": {"interval": 64}}
    stock, arm = plan(["knorm"], [128], **SIZES, common=common).arms
    assert stock.common == {} and arm.label == "knorm budget=128"
    assert arm.settings == {"method": "knorm", "budget": 128, **common}


@pytest.mark.parametrize(
    ("settings", "prompt_len", "kept"),
    [
        ({"method": "snapkv", "budget": 256}, 1024, 256),
        ({"method": "snapkv", "budget": 250}, 1024, 224),  # whole blocks only
        ({"method": "snapkv", "budget": 256}, 1025, 225),  # and the tail of 1
        ({"method": "pyramidkv", "budget": 256}, 1024, (448 + 32) / 2),
        ({"method": "pyramidinfer", "decay_ratio": 0.5}, 1024, (1024 + 608) / 2),
    ],
    ids=str,
)
def test_kept_tokens_are_the_mean_of_the_layers(settings, prompt_len, kept):
    assert kept_tokens(settings, prompt_len, 32, 2) == kept


def test_table_has_methods_by_budgets_and_stock_on_top():
    assert table_rows(RECORDS, [64, 256]) == [
        ["stock", "", "", "100%\n33.0"],
        ["snapkv", "75%\n3.0", "failed", ""],
        ["random", "0%\n3.0", "0%\n9.0", ""],
        ["pyramidinfer\ndecay_ratio=0.5", "", "", "50%\n27.0"],
    ]
    table = sweep_table(RECORDS, [32, 64, 256], "title")
    assert [column.header for column in table.columns[1:]] == [
        *("32", "64", "256", "none")
    ]
    assert list(table.columns[1].cells)[1] == "-"


def test_table_of_five_budgets_fits_a_narrow_terminal(capsys):
    table = sweep_table(RECORDS, [64, 128, 256, 512, 1024], "title")
    Console(width=80).print(table)
    printed = capsys.readouterr().out
    assert "decay_ratio=0.5" in printed and "…" not in printed


def test_curves_leave_failures_out_and_place_methods_without_budget():
    assert curves(RECORDS) == {
        "stock": [(1024, 1.0)],
        "snapkv": [(64, 0.75)],
        "random": [(64, 0.0), (256, 0.0)],
        "pyramidinfer": [(832.0, 0.5)],
    }


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_plot_is_written_and_small(tmp_path: Path, kind: str):
    file = tmp_path / f"sweep.{kind}"
    draw(RECORDS, "title", file)
    assert 0 < file.stat().st_size < 100 * 1024


def test_plot_survives_a_sweep_in_which_all_failed(tmp_path: Path):
    draw([record("stock", error="no")], "title", tmp_path / "sweep.png")


def test_blocks_of_tiers_count_as_shares_of_whole_blocks(monkeypatch):
    task = NeedleRun.prepare(prompt_len=256, count=2, needles=4, max_tokens=4)
    measures = {
        "kv_bytes_held": 2**20,
        "decode_requests": 2,
        "kv_blocks_per_request": 9.0,
        "decode_tokens_per_s": 1.0,
    }
    engine = {"block_size": 32, "block_bytes": 16 * task.model.token_bytes}
    outputs = [[task.prompts[0].answer_ids, []]]
    done = ArmResult(measures, outputs, None, engine)
    monkeypatch.setattr(needle_run, "run_arm", lambda *_, **__: done)
    assert task.run("x", {}, report=lambda share: None) == {
        "accuracy": 0.5,
        "kv_blocks_per_request": 4.5,
        "kv_mib_per_request": 0.5,
        "decode_tokens_per_s": 1.0,
    }


def test_one_failed_arm_leaves_the_others_and_the_file(tmp_path, monkeypatch, capsys):
    result = {"accuracy": 1.0, "kv_blocks_per_request": 3.0}

    def run(self, name, arm, **_):
        if name == "knorm budget=64":
            raise ToolError(f"{name}: RuntimeError: no memory")
        return result

    monkeypatch.setattr(NeedleRun, "run", run)
    flags = "--methods knorm,snapkv --budgets 128,64 --prompt-len 512 --requests 2"
    files = ["--json", f"{tmp_path}/new/s.json", "--plot", f"{tmp_path}/new/s.png"]
    assert main(["sweep", *flags.split(), *files]) == 1

    printed = capsys.readouterr()
    assert "failed: knorm budget=64: RuntimeError: no memory" in printed.err
    assert "512 tokens" in printed.out
    document = json.loads((tmp_path / "new" / "s.json").read_text())
    assert list(document) == ["settings", "environment", "skipped", "arms"]
    assert document["settings"]["budgets"] == [64, 128]
    labels = [arm["label"] for arm in document["arms"]]
    assert labels == ["stock", *(f"{m} budget={b}" for m, b in PAIRS)]
    failed = [arm["label"] for arm in document["arms"] if "error" in arm]
    assert failed == ["knorm budget=64"]
    assert document["arms"][-1]["kept_tokens"] == 128
    assert (tmp_path / "new" / "s.png").stat().st_size > 0


PAIRS = [("knorm", 64), ("knorm", 128), ("snapkv", 64), ("snapkv", 128)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--methods nope", "method is 'nope'; allowed values: snapkv"),
        ("--budgets 64,x", "'64,x' is not a list of numbers such as 64,"),
        ("--budgets 0", "0 is not at least 1"),
        ("--budgets 4096", "--budgets 4096 must be below --prompt-len 4096"),
        ("--prompt-len 90 --budgets 64", "90 tokens are too few for 8 needles"),
        ("--plot x.gif", "--plot x.gif must end in one of .pdf, .png, .svg"),
        ("--json /dev/null/x.json", "--json /dev/null/x.json cannot be written"),
    ],
)
def test_bad_arguments_are_one_line_and_not_zero(arguments, message, capsys):
    assert main(["sweep", *arguments.split()]) != 0
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert printed.startswith("kvcompress sweep: error: ")


def test_budgets_are_sorted_and_not_repeated():
    assert budget_list("256,64,256") == [64, 256]
