"""The report's page in a real browser: what it shows, fetches and complains of."""

import json

import pytest

from tests.unit import report_folders as folders
from tests.unit.browser import BROWSER, browser
from vllm_kvcompress.tools.main import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="needs Chromium or Chrome on PATH"),
]

EVIL = "<script>document.title = 'taken'; console.log('taken')</script>"
TABLES = """
Object.fromEntries([...document.querySelectorAll("table")].map(table => [
    table.caption.textContent,
    [...table.tBodies[0].rows].map(row => [...row.cells].map(c => c.textContent)),
]))
"""
IMAGES = "[...document.images].map(i => [i.alt, i.complete && i.naturalWidth])"
# What reaches out of the window, unless a box of its own scrolls it.
WIDE = """
[...document.body.querySelectorAll("*")].filter(
    e => e.getBoundingClientRect().right > innerWidth && !e.closest(".scroll, pre")
).map(e => e.outerHTML.slice(0, 80))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("report")
    folders.write_group(home / "eval")
    worse = folders.write_arm(home / "eval", "random", 64, label=EVIL)
    lines = folders.predictions("random", 64 / 4096)
    for line in lines:
        line["output"] = f"{EVIL}{'x' * 300}"
    folders.write_lines(worse / "predictions.jsonl", lines)
    folders.write_bench(home / "bench")
    assert main(["report", str(home), "--out", str(home / "report.html")]) == 0
    return home


@pytest.fixture(scope="module")
def tab(home, tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        tab.width(1280)
        tab.open(home / "report.html")
        yield tab


def test_nothing_is_fetched_and_nothing_complains(home, tab):
    page = (home / "report.html").resolve().as_uri()
    assert page in tab.requests
    assert [r for r in tab.requests if r != page and not r.startswith("data:")] == []
    assert tab.errors == []


def test_no_script_of_the_results_runs(tab):
    assert tab.evaluate("document.title") == "KV cache compression: results"
    assert tab.evaluate("document.scripts.length") == 0
    assert EVIL in tab.evaluate("document.body.textContent")


def test_all_pictures_are_shown(tab):
    images = tab.evaluate(IMAGES)
    assert len(images) == 10
    assert all(alt and width > 0 for alt, width in images)


def test_tables_are_the_data(home, tab):
    tables = tab.evaluate(TABLES)
    expected = {}
    for file in home.glob("eval/*/config.json"):
        metrics = json.loads(file.with_name("metrics.json").read_text())
        tasks = [metrics["by_task"][task]["accuracy"] for task in folders.TASKS]
        label = json.loads(file.read_text())["label"]
        shares = [metrics["accuracy"], *tasks]
        expected[label] = [f"{share:.1%}" for share in shares]
    assert {row[0]: row[1:5] for row in tables["Answers"]} == expected
    (stock,) = home.glob("eval/needle-stock-*/metrics.json")
    cells = [f"{c['accuracy']:.1%}" for c in json.loads(stock.read_text())["cells"]]
    shown = [row for row in tables["Accuracy by depth and length"] if row[0] == "stock"]
    assert sorted(c for row in shown for c in row[3:]) == sorted(cells)
    runs = [
        [f"{run['output_throughput']:,.1f}", f"{run['median_ttft_ms']:,.1f}"]
        for run in sorted(folders.runs(), key=lambda run: run["input_len"])
    ]
    assert [row[3:5] for row in tables["Runs"]] == runs
    ratios = next(rows for title, rows in tables.items() if title.startswith("Ratios"))
    assert {row[0] for row in ratios} == expected.keys() - {"stock"}


@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_the_window(home, tab, width):
    tab.width(width)
    tab.open(home / "report.html")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate(WIDE) == []
    picture = tab.screenshot(home / f"report-{width}.png")
    assert int.from_bytes(picture[16:20], "big") == pytest.approx(width, abs=20)


def test_dark_and_light_follow_the_system(tab):
    colors = []
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        tab.call("Emulation.setEmulatedMedia", features=[feature])
        colors.append(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colors == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]


def test_page_prints(home, tab):
    assert tab.pdf(home / "report.pdf").startswith(b"%PDF")
