"""Throughput over concurrency or request rate, with the preemption knee."""

from collections.abc import Iterator, Sequence
from math import isfinite

from ..compare import case_title
from ..records import Bench, Run
from .style import Palette, Picture, legend, load_axis, panels, variants

Points = list[tuple[float, Run]]


def by_case(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of the same traffic."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(case_title(run), []).append(run)
    return found


def by_load(runs: Sequence[Run]) -> tuple[str, dict[str, Points]]:
    """Each arm's runs by load, and which load was varied."""
    concurrent = {run.max_concurrency for run in runs}
    rates = {run.request_rate for run in runs}
    name, key = "requests at once", "max_concurrency"
    if len(concurrent) < len(rates):
        name, key = "requests per second", "request_rate"
    found: dict[str, Points] = {}
    for run in runs:
        load = getattr(run, key)
        if load is not None and isfinite(load):
            found.setdefault(run.arm, []).append((load, run))
    return name, {
        arm: sorted(points, key=lambda p: p[0]) for arm, points in found.items()
    }


def knee(points: Points) -> tuple[float, Run] | None:
    """The first point where the KV cache was too small."""
    return next((p for p in points if (p[1].preemptions or 0) > 0), None)


def _line(points: Points) -> tuple[list[float], list[float]]:
    return [load for load, _ in points], [run.throughput or 0.0 for _, run in points]


def throughput(bench: Bench, look: Palette) -> Iterator[Picture]:
    """A line per arm, a panel per case; bars where one load was run."""
    runs = [run for run in bench.runs if run.throughput is not None]
    curves, bars = {}, {}
    for title, own in by_case(runs).items():
        name, arms = by_load(own)
        if any(len(points) > 1 for points in arms.values()):
            curves[title] = (name, arms)
        else:
            bars[title] = own
    if curves:
        yield _curves(bench, curves, look)
    if bars:
        yield _bars(bench, bars, look)


def _curves(
    bench: Bench, curves: dict[str, tuple[str, dict[str, Points]]], look: Palette
) -> Picture:
    methods = bench.methods
    number = variants((methods[arm], arm) for arm in bench.arms)
    figure, axes = panels(list(curves), min(2, len(curves)))
    for axis, (name, arms) in zip(axes, curves.values(), strict=True):
        for arm in (arm for arm in bench.arms if arm in arms):
            points = arms[arm]
            style = look.look(methods[arm], number[arm])
            axis.plot(*_line(points), label=arm, **style)
        knees = [found for points in arms.values() if (found := knee(points))]
        if knees:
            axis.scatter(
                *_line(knees),
                s=180,
                facecolors="none",
                edgecolors="black",
                label="first preemption",
                zorder=3,
            )
        load_axis(axis, [load for points in arms.values() for load, _ in points])
        axis.margins(y=0.12)
        axis.set_ylim(bottom=0)
        axis.set_xlabel(name)
    axes[0].set_ylabel("tokens/s")
    legend(figure, columns=2)
    return Picture(
        "throughput",
        "Throughput over load",
        "Tokens per second over the load, a line per arm. A ring marks the first "
        "load at which requests were preempted because the KV cache was full.",
        figure,
    )


def _bars(bench: Bench, cases: dict[str, list[Run]], look: Palette) -> Picture:
    from .capacity import arm_bars

    values = {
        title: {run.arm: run.throughput or 0.0 for run in runs}
        for title, runs in cases.items()
    }
    figure = arm_bars(bench, values, "tokens/s", look)
    return Picture(
        "throughput-bars",
        "Throughput",
        "Tokens per second of each arm under the one load that was run; offline "
        "runs count the tokens of prompts too.",
        figure,
    )
