"""TTFT and TPOT over context length."""

from collections.abc import Iterator

from ..records import Bench
from .style import Palette, Picture, legend, panels, plain_log, variants
from .sweeps import over_length, over_load

FIGURES = ("ttft", "tpot")
STYLES = {
    "median": {},
    "p99": {"linewidth": 0.8, "markersize": 3, "alpha": 0.7, "label": "_p99"},
}


def latency(bench: Bench, look: Palette) -> Iterator[Picture]:
    """Medians as lines, the 99th percentile thin above them.

    Over context length where several were run, else over the load.
    """
    runs = [run for run in bench.runs if run.median_ttft_ms is not None]
    lengths = over_length(runs)
    sweeps = lengths or over_load(runs)
    if not sweeps:
        return
    methods = bench.methods
    number = variants((methods[arm], arm) for arm in bench.arms)
    titles = [f"{kind.upper()}, {sweep.title}" for sweep in sweeps for kind in FIGURES]
    figure, axes = panels(titles, columns=2)
    panel = iter(axes)
    for sweep in sweeps:
        for kind in FIGURES:
            axis = next(panel)
            for arm in (arm for arm in bench.arms if arm in sweep.arms):
                style = {**look.look(methods[arm], number[arm]), "label": arm}
                for figure_name, thin in STYLES.items():
                    key = f"{figure_name}_{kind}_ms"
                    points = [(x, getattr(run, key)) for x, run in sweep.arms[arm]]
                    known = [(sweep.place(x), y) for x, y in points if y is not None]
                    if known:
                        axis.plot(*zip(*known, strict=True), **{**style, **thin})
            sweep.draw_axis(axis)
            axis.set_yscale("log")
            plain_log(axis.yaxis)
            axis.set_ylabel("ms")
    legend(figure, columns=2)
    yield Picture(
        "latency",
        f"TTFT and TPOT over {'context length' if lengths else 'load'}",
        "Time to first token (TTFT) and time per token (TPOT): the median thick, the "
        "99th percentile thin. Lower is better; both axes are logarithmic.",
        figure,
    )
