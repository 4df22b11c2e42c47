"""Throughput over concurrency or request rate, with the preemption knee."""

from collections.abc import Iterator, Sequence

from ..compare import load_title
from ..records import Bench, Run
from .capacity import arm_bars
from .style import Palette, Picture, legend, panels, variants
from .sweeps import Points, Sweep, by_case, over_load

UNIT = "output tokens/s"


def knee(points: Points) -> tuple[float, Run] | None:
    """The first point where the KV cache was too small."""
    return next((p for p in points if (p[1].preemptions or 0) > 0), None)


def throughput(bench: Bench, look: Palette) -> Iterator[Picture]:
    """A line per arm, a panel per sweep; bars for traffic that was run once."""
    runs = [run for run in bench.runs if run.output_throughput is not None]
    if sweeps := over_load(runs):
        yield _curves(bench, sweeps, look)
    swept = {sweep.title for sweep in sweeps}
    bars = {
        f"{title}, {load_title(run)}": {
            other.arm: other.output_throughput or 0.0
            for other in own
            if other.load == run.load
        }
        for title, own in by_case(runs).items()
        if title not in swept
        for run in own
    }
    if bars:
        yield Picture(
            "throughput-bars",
            "Throughput",
            "Output tokens per second of each arm; this traffic was run once.",
            arm_bars(bench, bars, UNIT, look),
        )


def _curves(bench: Bench, sweeps: Sequence[Sweep], look: Palette) -> Picture:
    methods = bench.methods
    number = variants((methods[arm], arm) for arm in bench.arms)
    figure, axes = panels([sweep.title for sweep in sweeps], min(2, len(sweeps)))
    for axis, sweep in zip(axes, sweeps, strict=True):
        for arm in (arm for arm in bench.arms if arm in sweep.arms):
            style = look.look(methods[arm], number[arm])
            axis.plot(*_line(sweep, sweep.arms[arm]), label=arm, **style)
        knees = [found for points in sweep.arms.values() if (found := knee(points))]
        if knees:
            axis.scatter(
                *_line(sweep, knees),
                s=180,
                facecolors="none",
                edgecolors="black",
                label="first preemption",
                zorder=3,
            )
        sweep.draw_axis(axis)
        axis.margins(y=0.12)
        axis.set_ylim(bottom=0)
        axis.set_ylabel(UNIT)
    legend(figure, columns=2)
    return Picture(
        "throughput",
        "Throughput over load",
        "Output tokens per second over the load, a line per arm. A ring marks the "
        "first load at which requests were preempted because the KV cache was full.",
        figure,
    )


def _line(sweep: Sweep, points: Points) -> tuple[list[float], list[float]]:
    places = [sweep.place(x) for x, _ in points]
    return places, [run.output_throughput or 0.0 for _, run in points]
