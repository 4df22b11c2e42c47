"""The page: one HTML file that fetches nothing."""

import io
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from .again import bench_commands, eval_commands
from .compare import Comparison, bench_comparisons, eval_comparisons
from .records import Bench, Group, Results
from .tables import (
    Table,
    cell_table,
    eval_table,
    example_table,
    fields_tables,
    ratio_table,
    run_table,
    verdict,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .pictures import Picture

MARK = "vllm-kvcompress: kvcompress report"
"""Stands in every file that the command writes; only such files are overwritten."""
_METADATA = {
    "png": {"Software": MARK},
    "svg": {"Creator": MARK, "Date": None},
    "pdf": {"Creator": MARK, "CreationDate": None},
}


@dataclass
class Section:
    """What one group or benchmark shows."""

    title: str
    verdict: str
    ratios: Table | None
    pictures: Sequence["Picture"] = ()
    tables: list[Table] = field(default_factory=list)


def file_of(figure: "Figure", format: str) -> bytes:
    """A figure as a file's content, the same for the same data."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": MARK}):
        figure.savefig(buffer, format=format, dpi=150, metadata=_METADATA[format])
    return buffer.getvalue()


def eval_section(group: Group, pictures: Sequence["Picture"]) -> Section:
    """A group of arms that answered the same questions."""
    section = _section(group.title, list(eval_comparisons(group)), pictures)
    more = [cell_table(group), example_table(group)]
    section.tables = [eval_table(group), *filter(None, more)]
    return section


def bench_section(bench: Bench, pictures: Sequence["Picture"]) -> Section:
    """A benchmark."""
    section = _section(bench.title, list(bench_comparisons(bench)), pictures)
    section.tables = [run_table(bench)]
    return section


def _section(
    title: str, comparisons: list[Comparison], pictures: Sequence["Picture"]
) -> Section:
    if not comparisons:
        return Section(title, "Nothing to compare with stock.", None, pictures)
    ratios = ratio_table(f"Ratios to stock: {title}", comparisons)
    return Section(title, verdict(comparisons), ratios, pictures)


def setting_tables(results: Results) -> list[Table]:
    """How everything was configured, and where it ran."""
    tables: list[Table] = []
    environments: dict[str, dict[str, Any]] = {}
    for group in results.groups:
        configs = {}
        for arm in group.arms:
            configs[arm.folder] = arm.config.model_dump(by_alias=True)
            environments[arm.folder] = arm.environment
        tables += fields_tables(f"Configuration of {group.title}", configs, "folder")
    for bench in results.benches:
        configs = {own.folder: own.config for own in bench.folders}
        environments |= {own.folder: own.environment for own in bench.folders}
        tables += fields_tables(f"Configuration of {bench.title}", configs, "folder")
    return [*tables, *fields_tables("Environment", environments, "folder")]


def page(
    title: str,
    results: Results,
    evals: Sequence[Section],
    benches: Sequence[Section],
    command: str,
) -> str:
    """Fill in the template; all text is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["image"] = _image
    text = files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        mark=MARK,
        title=title,
        notes=results.notes,
        evals=evals,
        benches=benches,
        settings=setting_tables(results),
        commands=[*eval_commands(results), *bench_commands(results), command],
    )


def _image(picture: "Picture") -> str:
    """A picture as the address of an image."""
    data = b64encode(file_of(picture.figure, "svg")).decode()
    return f"data:image/svg+xml;base64,{data}"
