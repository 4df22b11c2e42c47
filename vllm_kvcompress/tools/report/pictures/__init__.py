"""The pictures, each drawn from records by one function in a file of its own."""

from collections.abc import Iterator

from ..records import Bench, Group, Results
from .accuracy import accuracy
from .capacity import capacity
from .fidelity import fidelity
from .heat_map import heat_maps
from .latency import latency
from .pareto import kept_front, throughput_fronts
from .style import Palette, Picture
from .throughput import throughput

__all__ = ["Picture", "bench_pictures", "eval_pictures", "palette"]


def palette(results: Results) -> Palette:
    """One look per method for all pictures of a report."""
    arms = [arm for group in results.groups for arm in group.arms]
    runs = [run for bench in results.benches for run in bench.runs]
    names = {arm.method for arm in arms} | {run.method or run.arm for run in runs}
    return Palette(names)


def eval_pictures(group: Group, results: Results, look: Palette) -> Iterator[Picture]:
    """What a group's answers show, as far as its records go."""
    yield from accuracy(group, look)
    yield from heat_maps(group)
    yield from fidelity(group, look)
    yield from kept_front(group, look)
    for bench in results.benches:
        if bench.model == group.arms[0].config.model:
            yield from throughput_fronts(group, bench, look)


def bench_pictures(bench: Bench, look: Palette) -> Iterator[Picture]:
    """What a benchmark's runs show."""
    yield from throughput(bench, look)
    yield from latency(bench, look)
    yield from capacity(bench, look)
