"""`kvcompress report`: reading, ratios, the page's text, and errors in one line."""

import json
import re
import shlex
import shutil
from html.parser import HTMLParser

import pytest

from tests.unit import report_folders as folders
from vllm_kvcompress.tools.errors import ToolError
from vllm_kvcompress.tools.main import main
from vllm_kvcompress.tools.report.again import bench_commands, eval_commands
from vllm_kvcompress.tools.report.compare import bench_comparisons, eval_comparisons
from vllm_kvcompress.tools.report.read import read_results
from vllm_kvcompress.tools.report.tables import fields_tables, ratio_table, verdict

EVIL = "<script>document.title = 'taken'</script>"


def torn(file):
    """Cut a file of lines off within its last line."""
    text = file.read_bytes()
    file.write_bytes(text[: text.rstrip().rfind(b"\n") + 30])


@pytest.fixture
def home(tmp_path):
    folders.write_group(tmp_path / "eval", budgets=(128, 512))
    folders.write_bench(tmp_path / "bench")
    return tmp_path


def failing(capsys, *argv):
    """The one line that a refused call says."""
    assert main(["report", *map(str, argv)]) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    return line


def test_groups_hold_the_arms_of_the_same_questions(tmp_path):
    folders.write_group(tmp_path / "one", budgets=(128,))
    folders.write_arm(tmp_path / "two", "snapkv", 128, group="other")
    results = read_results([tmp_path])
    one, two = results.groups
    labels = [arm.label for arm in one.arms]
    assert labels == [
        "stock",
        "knorm budget=128",
        "random budget=128",
        "snapkv budget=128",
    ]
    assert [arm.label for arm in two.arms] == ["snapkv budget=128"]
    assert two.stock is None
    (note,) = results.notes
    assert "no stock arm" in note


def test_a_folder_may_be_one_result(tmp_path):
    folder = folders.write_arm(tmp_path, "stock")
    (group,) = read_results([folder, tmp_path]).groups
    (arm,) = group.arms
    assert arm.folder == str(folder)
    assert len(arm.predictions) == arm.metrics.samples


def test_a_torn_line_is_left_out_and_named(tmp_path):
    folder = folders.write_arm(tmp_path, "snapkv", 512)
    whole = folders.predictions("snapkv", 512 / 4096)
    torn(folder / "predictions.jsonl")
    results = read_results([tmp_path])
    (arm,) = results.groups[0].arms
    assert arm.metrics.samples == len(arm.predictions) == len(whole) - 1
    assert arm.metrics.accuracy == folders.mean(whole[:-1])["accuracy"]
    assert arm.kept_share == 512 / 4096
    assert not arm.metrics.complete
    assert any("1 line is cut off" in note for note in results.notes)


def test_metrics_are_made_again_from_predictions(tmp_path):
    folder = folders.write_arm(tmp_path, "snapkv", 512)
    expected = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").unlink()
    results = read_results([tmp_path])
    (arm,) = results.groups[0].arms
    found = arm.metrics.model_dump()
    assert found["accuracy"] == expected["accuracy"]
    assert found["by_task"] == expected["by_task"]
    assert found["cells"] == expected["cells"]
    assert found["fidelity"] == pytest.approx(
        {**expected["fidelity"], "tokens": 8 * len(arm.predictions)}
    )
    assert arm.kept_share is None
    assert any("made again" in note for note in results.notes)


def test_half_written_metrics_are_not_used(tmp_path):
    folder = folders.write_arm(tmp_path, "snapkv", 512)
    text = (folder / "metrics.json").read_text()
    (folder / "metrics.json").write_text(text[:50])
    results = read_results([tmp_path])
    assert results.groups[0].arms[0].metrics.samples == 42
    assert any("half-written" in note for note in results.notes)


def test_an_arm_that_has_not_begun_is_named(tmp_path):
    folders.write_arm(tmp_path, "stock")
    folder = folders.write_arm(tmp_path, "snapkv", 512)
    (folder / "metrics.json").unlink()
    (folder / "predictions.jsonl").unlink()
    results = read_results([tmp_path])
    assert [arm.label for arm in results.groups[0].arms] == ["stock"]
    assert results.notes == [f"{folder} holds no results yet; left out"]


def test_repeated_runs_are_their_medians(tmp_path):
    speeds = (100.0, 300.0, 110.0)
    lines = [folders.run("stock", None, output_throughput=s) for s in speeds]
    lines.append(folders.run("stock", None, max_concurrency=4, failed=2))
    folders.write_bench(tmp_path, lines)
    results = read_results([tmp_path])
    three, one = results.benches[0].runs
    assert (three.output_throughput, three.repeats) == (110.0, 3)
    assert (one.failed, one.repeats) == (2, 1)
    assert any("2 requests failed" in note for note in results.notes)


def test_ratios_say_who_lost(home):
    results = read_results([home])
    own = list(eval_comparisons(results.groups[0]))
    table = ratio_table("t", own)
    snapkv = next(row for row in table.rows if row[0].text == "snapkv budget=512")
    stock, arm = (
        next(a for a in results.groups[0].arms if a.label == label).metrics.accuracy
        for label in ("stock", "snapkv budget=512")
    )
    assert arm < stock
    assert snapkv[1].text == f"{arm / stock:.2f}x LOST"
    assert snapkv[1].kind == "lost"
    assert (snapkv[-1].text, snapkv[-1].kind) == ("0.12x", "won")


def test_ratios_compare_the_same_load_and_say_which_way_is_better(home):
    runs = list(bench_comparisons(read_results([home]).benches[0]))
    found = {(own.arm, own.case): own.changes for own in runs}
    assert len(found) == 3 * 2 * 4
    busy = found["snapkv budget=512", "random, 4,096 in, 128 out, 64 at once"]
    assert busy["output_throughput"].ratio == pytest.approx(6**0.8 / 1.1)
    assert not busy["output_throughput"].lost
    assert busy["median_tpot_ms"].ratio == pytest.approx(1.1 * 6**0.2)
    assert busy["median_tpot_ms"].lost
    assert busy["preemptions"].gain == 40
    quiet = found["snapkv budget=512", "random, 4,096 in, 128 out, 1 at once"]
    assert quiet["preemptions"].ratio is None
    losses = sum(change.lost for own in runs for change in own.changes.values())
    assert verdict(runs).endswith(f"{losses} LOST.")


def test_fields_that_all_share_are_shown_once():
    shared, own = fields_tables("t", {"a": {"x": 1, "y": 2}, "b": {"x": 1}}, "folder")
    assert [[cell.text for cell in row] for row in shared.rows] == [["x", "1"]]
    assert [[cell.text for cell in row] for row in own.rows] == [["a", "2"], ["b", "–"]]


def test_folders_that_differ_in_traffic_alone_belong_together(home):
    (bench,) = read_results([home]).benches
    assert [own.runs[0].input_len for own in bench.folders] == [4096, 16384]
    shutil.copytree(home / "bench", home / "again")
    one, two = read_results([home]).benches
    assert len(one.runs) == len(two.runs) == len(folders.runs())
    for file in (home / "again").glob("*/environment.json"):
        folders.write(file, {**folders.ENVIRONMENT, "cpu": "another"})
    assert len(read_results([home]).benches) == 2


def test_commands_are_those_that_made_the_results(home):
    results = read_results([home])
    (command,) = eval_commands(results)
    words = shlex.split(command)
    flags = dict(zip(words[2::2], words[3::2], strict=True))
    assert words[:2] == ["kvcompress", "eval"]
    assert flags["--tasks"] == ",".join(folders.TASKS)
    assert flags["--depths"] == "0,50,100"
    assert set(flags["--methods"].split(",")) == {"snapkv", "knorm", "random"}
    assert flags["--budgets"] == "128,512"
    assert json.loads(flags["--engine"]) == {"block_size": 32}
    assert "--config" not in flags
    first, second = map(shlex.split, bench_commands(results))
    assert first[:3] == ["kvcompress", "bench", "serve"]
    assert first[first.index("--input-len") + 1] == "4096"
    assert second[second.index("--input-len") + 1] == "16384"
    assert first[first.index("--concurrencies") + 1] == "1,4,16,64"
    assert first[first.index("--budgets") + 1] == "512"


def test_settings_besides_the_budget_are_in_the_command(tmp_path):
    folders.write_arm(tmp_path, "stock")
    settings = {"method": "snapkv", "keep_ratio": 0.25, "window": 16}
    folder = folders.write_arm(tmp_path, "snapkv", 1024)
    size = {"settings": settings, "budget": None, "keep_ratio": 0.25}
    config = {**folders.config("snapkv", 1024), **size}
    folders.write(folder / "config.json", config)
    (command,) = eval_commands(read_results([tmp_path]))
    assert command.endswith("""--keep-ratios 0.25 --config '{"window": 16}'""")


class Text(HTMLParser):
    """The tags of a page, their addresses, and the text between them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        named = dict(attributes)
        self.addresses += [named[key] for key in ("src", "href") if key in named]
        if tag == "img":
            assert named["alt"]

    def handle_data(self, data):
        self.text += data


def test_page_has_everything_and_fetches_nothing(home, capsys):
    out = home / "r.html"
    assert main(["report", str(home), "--out", str(out), "--title", "A & B"]) == 0
    assert capsys.readouterr().out == f"{out} written\n"
    page = Text(out.read_text())
    assert "A & B" in page.text
    assert page.tags.count("img") == 10
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"url\(|@import", out.read_text())
    assert f"kvcompress report {home} --out {out} --title 'A & B'" in page.text
    for words in ("LOST", "Kept share", "lower bound", "Inside:", "0.32.0"):
        assert words in page.text


def test_text_of_results_is_escaped(tmp_path):
    stock = folders.write_arm(tmp_path, "stock", model=EVIL)
    folder = folders.write_arm(tmp_path, "random", 128, model=EVIL, label=EVIL)
    lines = folders.predictions("random", 128 / 4096)
    for line in lines:
        line["output"] = f"{EVIL}{line['output']}"
    folders.write_lines(folder / "predictions.jsonl", lines)
    folders.write(stock / "environment.json", {"cpu": EVIL})
    out = tmp_path / "r.html"
    assert main(["report", str(tmp_path), "--out", str(out), "--title", EVIL]) == 0
    page = Text(out.read_text())
    assert "script" not in page.tags
    assert page.text.count(EVIL) >= 8  # title, model, label, output, environment


def test_same_results_make_the_same_page(home):
    out = home / "r.html"
    pages = []
    for _ in range(2):
        assert main(["report", str(home), "--out", str(out)]) == 0
        pages.append(out.read_bytes())
    assert pages[0] == pages[1]


@pytest.mark.parametrize("form", ["png", "svg", "pdf"])
def test_pictures_are_files_and_may_be_written_again(tmp_path, form):
    folders.write_group(tmp_path / "in", budgets=(128,))
    pictures = tmp_path / "pictures"
    argv = ["report", str(tmp_path / "in"), "--out", str(tmp_path / "r.html")]
    argv += ["--pictures", str(pictures), "--format", form]
    for _ in range(2):
        assert main(argv) == 0
    names = {file.name for file in pictures.iterdir()}
    assert f"1-accuracy.{form}" in names
    assert len(names) == 5
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[form]
    assert all(file.read_bytes().startswith(start) for file in pictures.iterdir())


def test_what_is_not_ours_is_not_overwritten(home, capsys):
    out = home / "mine.html"
    out.write_text("my notes about kvcompress report")
    assert "is no report of ours" in failing(capsys, home, "--out", out)
    assert out.read_text() == "my notes about kvcompress report"
    (home / "pictures").mkdir()
    taken = home / "pictures" / "1-accuracy.png"
    taken.write_bytes(b"a photo")
    more = ["--out", home / "r.html", "--pictures", taken.parent]
    assert str(taken) in failing(capsys, home, *more)
    assert taken.read_bytes() == b"a photo"
    assert not (home / "r.html").exists()


def test_an_unwritable_page_is_one_line(home, capsys):
    (home / "file").write_text("")
    line = failing(capsys, home, "--out", home / "file" / "r.html")
    assert "cannot be written" in line
    assert "cannot be written" in failing(capsys, home, "--out", home)


def test_a_folder_that_is_not_there(tmp_path, capsys):
    line = failing(capsys, tmp_path / "nothing")
    assert line.endswith(f"{tmp_path / 'nothing'} does not exist")
    (tmp_path / "file").write_text("")
    assert "is not a folder" in failing(capsys, tmp_path / "file")


def test_an_empty_folder(tmp_path, capsys):
    assert "no results of kvcompress eval or bench" in failing(capsys, tmp_path)
    folder = folders.write_arm(tmp_path, "stock")
    for name in ("metrics.json", "predictions.jsonl"):
        (folder / name).unlink()
    assert "holds no results yet" in failing(capsys, tmp_path)


def test_another_schema_version(home, capsys):
    folder = folders.write_arm(home / "new", "stock", schema=2)
    line = failing(capsys, home, "--out", home / "r.html")
    assert f"{folder / 'config.json'} has schema 2" in line
    shutil.rmtree(home / "new")
    assert main(["report", str(home), "--out", str(home / "r.html")]) == 0


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", "{", "is not JSON"),
        ("config.json", "[]", "is not a JSON object"),
        ("config.json", '{"schema": 1}', "config.json: model: Field required"),
        ("metrics.json", '{"accuracy": "x"}', "metrics.json: accuracy:"),
        ("predictions.jsonl", '{"task": "qa"}\n', "line 1: length: Field required"),
        ("predictions.jsonl", "\n7\n", "line 2:"),
    ],
)
def test_records_that_are_wrong(tmp_path, capsys, name, text, words):
    folder = folders.write_arm(tmp_path, "stock")
    (folder / name).write_text(text)
    line = failing(capsys, tmp_path, "--out", tmp_path / "r.html")
    assert words in line
    assert str(folder / name) in line


def test_missing_environment_is_a_note(tmp_path):
    folder = folders.write_arm(tmp_path, "stock")
    (folder / "environment.json").unlink()
    (note,) = read_results([tmp_path]).notes
    assert "the machine is not known" in note


def test_read_results_raises_tool_errors_alone(tmp_path):
    with pytest.raises(ToolError):
        read_results([tmp_path / "nothing"])
