"""What the report draws: the numbers that matplotlib is given."""

import json
from math import isnan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit import report_folders as folders
from vllm_kvcompress.tools.report.compare import pareto_front
from vllm_kvcompress.tools.report.pictures import (
    bench_pictures,
    eval_pictures,
    palette,
)
from vllm_kvcompress.tools.report.pictures.throughput import knee
from vllm_kvcompress.tools.report.read import read_results
from vllm_kvcompress.tools.report.records import Run


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    home = tmp_path_factory.mktemp("results")
    folders.write_group(home / "eval")
    folders.write_bench(home / "bench")
    return read_results([home])


@pytest.fixture(scope="module")
def pictures(results):
    """All figures by name."""
    look = palette(results)
    (group,), (bench,) = results.groups, results.benches
    drawn = [*eval_pictures(group, results, look), *bench_pictures(bench, look)]
    return {picture.name: picture.figure for picture in drawn}


def lines_of(axis):
    """The x and y values of each labelled line."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axis.lines
        if not line.get_label().startswith("_")
    }


def by_label(group):
    return {arm.label: arm for arm in group.arms}


def test_everything_is_drawn(pictures):
    assert list(pictures) == [
        "accuracy",
        "needles-niah_single",
        "needles-niah_multikey",
        "fidelity",
        "pareto-kept",
        "pareto-throughput-1",
        "pareto-throughput-2",
        "throughput",
        "latency",
        "capacity",
    ]


def test_accuracy_is_a_line_per_method_over_kept_share(results, pictures):
    (group,) = results.groups
    whole, *tasks = pictures["accuracy"].axes
    arms = by_label(group)
    shares = [128 / 4096, 512 / 4096, 2048 / 4096]
    for method in ("snapkv", "knorm", "random"):
        own = [arms[f"{method} budget={budget}"].metrics for budget in (128, 512, 2048)]
        assert lines_of(whole)[method] == (shares, [m.accuracy for m in own])
        for axis in tasks:
            values = [m.by_task[axis.get_title()].accuracy for m in own]
            assert lines_of(axis)[method] == (shares, values)
    assert {axis.get_title() for axis in tasks} == set(folders.TASKS)
    assert set(lines_of(whole)["stock"][1]) == {arms["stock"].metrics.accuracy}
    stock = next(line for line in whole.lines if line.get_label() == "stock")
    assert stock.get_linestyle() == "--"


def test_needles_are_cells_of_depth_and_length(results, pictures):
    (group,) = results.groups
    axes = [axis for axis in pictures["needles-niah_single"].axes if axis.images]
    assert [axis.get_title() for axis in axes] == [arm.label for arm in group.arms]
    assert axes[0].get_title() == "stock"
    for axis, arm in zip(axes, group.arms, strict=True):
        (image,) = axis.images
        assert image.get_clim() == (0, 1)
        found = image.get_array()
        cells = [c for c in arm.metrics.cells if c.task == "niah_single"]
        assert found.size == len(cells)
        for cell in cells:
            row = folders.DEPTHS.index(cell.depth)
            assert found[row][folders.LENGTHS.index(cell.length)] == cell.accuracy


def test_fidelity_is_agreement_and_kl(results, pictures):
    (group,) = results.groups
    agreement, kl = pictures["fidelity"].axes
    near = by_label(group)["snapkv budget=512"].metrics.fidelity
    assert lines_of(agreement)["snapkv"][1][1] == near.agreement
    assert lines_of(kl)["snapkv"][1][1] == near.kl
    assert "stock" not in lines_of(agreement)


def test_front_of_kept_share(results, pictures):
    (group,) = results.groups
    (axis,) = pictures["pareto-kept"].axes
    points = {(arm.kept_share, arm.metrics.accuracy) for arm in group.arms}
    on_front = {
        (x, y)
        for x, y in points
        if not any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)
    }
    drawn = {(xs[0], ys[0]) for xs, ys in lines_of(axis).values()}
    assert drawn == on_front
    (beaten,) = axis.collections
    assert {tuple(point) for point in beaten.get_offsets()} == points - on_front


def test_throughput_is_a_line_per_arm_and_rings_the_knee(results, pictures):
    (bench,) = results.benches
    first, second = pictures["throughput"].axes
    own = [r for r in bench.runs if r.arm == "stock" and r.input_len == 4096]
    assert lines_of(first)["stock"] == (
        [1, 4, 16, 64],
        [r.output_throughput for r in own],
    )
    # 8 requests of 4096 tokens fit into stock's cache, 2 of 16384.
    for axis, at in ((first, 16), (second, 4)):
        (rings,) = axis.collections
        loads, speeds = lines_of(axis)["stock"]
        assert [at, speeds[loads.index(at)]] in rings.get_offsets().tolist()
        assert len(rings.get_offsets()) == len(folders.ARMS)


def test_latency_is_over_context_length(results, pictures):
    (bench,) = results.benches
    axes = pictures["latency"].axes
    assert [axis.get_title() for axis in axes[:2]] == [
        "TTFT, 1 at once",
        "TPOT, 1 at once",
    ]
    own = [r for r in bench.runs if r.arm == "stock" and r.max_concurrency == 1]
    ttft, tpot = axes[:2]
    lengths = [run.input_len for run in own]
    assert lines_of(ttft)["stock"] == (lengths, [run.median_ttft_ms for run in own])
    assert lines_of(tpot)["stock"] == (lengths, [run.median_tpot_ms for run in own])
    drawn = [list(line.get_ydata()) for line in ttft.lines]
    assert [run.p99_ttft_ms for run in own] in drawn


def test_capacity_is_the_most_that_ran_at_once(pictures):
    first, _ = pictures["capacity"].axes
    labels = [label.get_text() for label in first.get_yticklabels()]
    widths = [bar.get_width() for bar in first.patches]
    assert dict(zip(labels, widths, strict=True)) == {
        arm: min(64, room) for arm, _, room in folders.ARMS
    }


def test_a_method_has_one_colour_in_all_pictures(pictures):
    colors: dict[str, set] = {}
    for figure in pictures.values():
        for axis in figure.axes:
            for line in axis.lines:
                method = line.get_label().split(" budget=")[0].split(" ")[-1]
                colors.setdefault(method, set()).add(line.get_color())
    assert len(colors["snapkv"]) == len(colors["knorm"]) == 1
    assert colors["snapkv"] != colors["knorm"]


@given(
    st.lists(
        st.tuples(st.integers(0, 6).map(float), st.integers(0, 6).map(float)),
        max_size=20,
    )
)
def test_pareto_front_is_what_no_other_beats(points):
    def beaten(x, y):
        return any(a >= x and b >= y and (a, b) != (x, y) for a, b in points)

    front = pareto_front(points)
    assert sorted(front) == [i for i, p in enumerate(points) if not beaten(*p)]
    assert [points[i] for i in front] == sorted(points[i] for i in front)


@given(st.lists(st.integers(0, 2), max_size=8))
def test_knee_is_the_first_preemption(preemptions):
    points = [
        (float(load), Run(kind="serve", arm="stock", preemptions=count))
        for load, count in enumerate(preemptions)
    ]
    found = knee(points)
    if found is None:
        assert sum(preemptions) == 0
    else:
        load = int(found[0])
        assert preemptions[load] > 0
        assert sum(preemptions[:load]) == 0


def drawn(home, runs):
    """The pictures of these runs by name."""
    folders.write_bench(home, runs)
    results = read_results([home])
    (bench,) = results.benches
    return {p.name: p.figure for p in bench_pictures(bench, palette(results))}


def test_what_was_run_once_is_a_bar(tmp_path):
    lines = [
        folders.run("stock", None, kind="throughput", output_throughput=speed)
        for speed in (100.0, 300.0, 200.0)
    ]
    for line in lines:
        for key in ("median_ttft_ms", "running_peak"):
            del line[key]
    ((name, figure),) = drawn(tmp_path, lines).items()
    assert name == "throughput-bars"
    (axis,) = figure.axes
    # Repeated runs are their median.
    assert [bar.get_width() for bar in axis.patches] == [200.0]


def test_rates_and_concurrencies_are_panels_of_their_own(tmp_path):
    loads = [(1, "inf"), (4, "inf"), (None, 2.0), (None, 8.0), (None, "inf")]
    lines = [
        folders.run(
            "stock",
            None,
            max_concurrency=at_once,
            request_rate=rate,
            output_throughput=float(number),
        )
        for number, (at_once, rate) in enumerate(loads)
    ]
    figures = drawn(tmp_path, lines)
    at_once, rates = figures["throughput"].axes
    assert lines_of(at_once) == {"stock": ([1, 4], [0.0, 1.0])}
    # All requests at once stand right of the highest rate.
    assert lines_of(rates) == {"stock": ([2, 8, 16], [2.0, 3.0, 4.0])}
    assert [t.get_text() for t in rates.get_xticklabels()] == ["2", "8", "all"]
    assert len(figures["latency"].axes) == 4


def test_without_kept_shares_accuracy_is_over_the_budget(tmp_path):
    folders.write_group(tmp_path, budgets=(128, 512))
    for file in tmp_path.glob("*/metrics.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "kv": None}))
    results = read_results([tmp_path])
    (group,) = results.groups
    pictures = {
        p.name: p.figure for p in eval_pictures(group, results, palette(results))
    }
    axis = pictures["accuracy"].axes[0]
    assert lines_of(axis)["snapkv"][0] == [128, 512]
    assert "budget" in axis.get_xlabel()
    assert "pareto-kept" not in pictures


def test_unasked_cells_stay_empty(tmp_path):
    folder = folders.write_arm(tmp_path, "stock")
    kept = [p for p in folders.predictions("stock", 1.0) if p["length"] != 2048]
    more = [p for p in folders.predictions("stock", 1.0) if p["depth"] == 0.0]
    folders.write_lines(folder / "predictions.jsonl", kept + more)
    results = read_results([tmp_path])
    (group,) = results.groups
    (heat,) = (
        p
        for p in eval_pictures(group, results, palette(results))
        if p.name == "needles-niah_single"
    )
    values = heat.figure.axes[0].images[0].get_array().filled(float("nan"))
    assert [isnan(value) for value in values[:, 0]] == [False, True, True]
    assert not any(isnan(value) for value in values[:, 1:].flat)
