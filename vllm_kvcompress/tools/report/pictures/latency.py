"""TTFT and TPOT over context length."""

from collections.abc import Iterator, Sequence

from ..compare import case_title, load_title
from ..records import Bench, Run
from .style import Palette, Picture, legend, load_axis, panels, plain_log, variants
from .throughput import by_load

FIGURES = ("ttft", "tpot")


def rows(runs: Sequence[Run]) -> dict[str, tuple[str, dict[str, list]]]:
    """Rows of panels: the name of the x axis, and each arm's points.

    Over context length at each load that has several; else over the load.
    """
    found: dict[str, tuple[str, dict[str, list]]] = {}
    loads: dict[str, list[Run]] = {}
    several = len({(run.dataset, run.output_len) for run in runs}) > 1
    for run in runs:
        if run.input_len is not None:
            traffic = f", {run.dataset}, {run.output_len} out" if several else ""
            loads.setdefault(load_title(run) + traffic, []).append(run)
    for title, own in loads.items():
        if len({run.input_len for run in own}) > 1:
            arms: dict[str, list] = {}
            for run in sorted(own, key=lambda run: run.input_len or 0):
                arms.setdefault(run.arm, []).append((run.input_len, run))
            found[title] = ("tokens of the prompt", arms)
    if not found:
        for title in dict.fromkeys(map(case_title, runs)):
            name, arms = by_load([run for run in runs if case_title(run) == title])
            if arms:
                found[title] = (name, arms)
    return found


def latency(bench: Bench, look: Palette) -> Iterator[Picture]:
    """Medians as lines, the 99th percentile thin above them."""
    runs = [run for run in bench.runs if run.median_ttft_ms is not None]
    found = rows(runs)
    if not found:
        return
    methods = bench.methods
    number = variants((methods[arm], arm) for arm in bench.arms if arm in methods)
    titles = [f"{kind.upper()}, {row}" for row in found for kind in FIGURES]
    figure, axes = panels(titles, columns=2)
    panel = iter(axes)
    for x_name, arms in found.values():
        for kind in FIGURES:
            axis = next(panel)
            for arm in (arm for arm in bench.arms if arm in arms):
                style = look.look(methods[arm], number[arm])
                for share, extra in (
                    ("median", {"label": arm}),
                    ("p99", {"linewidth": 0.8, "markersize": 3, "alpha": 0.7}),
                ):
                    points = [
                        (x, value)
                        for x, run in arms[arm]
                        if (value := getattr(run, f"{share}_{kind}_ms")) is not None
                    ]
                    if points:
                        axis.plot(*zip(*points, strict=True), **{**style, **extra})
            load_axis(axis, [x for points in arms.values() for x, _ in points])
            axis.set_yscale("log")
            plain_log(axis.yaxis)
            axis.set_xlabel(x_name)
            axis.set_ylabel("ms")
    legend(figure, columns=2)
    over = next(iter(found.values()))[0]
    yield Picture(
        "latency",
        f"TTFT and TPOT over {over}",
        "Time to first token (TTFT) and time per token (TPOT): the median thick, the "
        "99th percentile thin. Lower is better; both axes are logarithmic.",
        figure,
    )
