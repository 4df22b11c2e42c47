"""What `kvcompress top` shows in the terminal."""

from collections.abc import Mapping

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..scrape import SKIPPED, Figures, Read
from .figures import rates, restarted, shares, total

_SERVED = ("prompt_tokens", "generation_tokens", "preemptions")
_COMPRESSED = ("compressions", "tokens_evicted", "tokens_merged", "blocks_freed")


def view(url: str, before: Read | None, now: Read, notice: str = "") -> Group:
    """Everything about one read, and what changed since the one before."""
    figures, by_engine = total(now.engines), rates(before, now)
    speeds = total(by_engine) if by_engine else None
    parts: list[Text | Table] = [
        Text(f"{', '.join(sorted(now.models))} at {url}", style="bold"),
        Text(
            f"requests: {figures.get('running', 0):,.0f} running, "
            f"{figures.get('waiting', 0):,.0f} waiting; "
            f"KV cache: {_percent(figures.get('kv_cache_usage'))} in use"
        ),
        Text(settings_line(now.settings)),
        figure_table(figures, speeds, now.settings is not None),
    ]
    if len(now.engines) > 1:
        parts.append(engine_table(now.engines, by_engine))
    if before and restarted(before, now):
        notice = notice or "Counters began anew: the server has started again."
    if notice:
        # Near the top, since a low terminal cuts off what is below.
        parts.insert(1, Text(notice, style="red"))
    return Group(*parts)


def settings_line(settings: Mapping[str, str] | None) -> str:
    """How the server compresses."""
    if settings is None:
        return "KV compression: none; the server runs without --kv-compression"
    others = (f"{k}={v}" for k, v in settings.items() if k != "method")
    return f"KV compression: {', '.join([settings.get('method', '?'), *others])}"


def figure_table(figures: Figures, speeds: Figures | None, compresses: bool) -> Table:
    """Counts since the server's start, and what comes to them per second."""
    table = Table()
    table.add_column("", no_wrap=True)
    table.add_column("since start", justify="right", no_wrap=True)
    table.add_column("now", justify="right", no_wrap=True)
    whole, part = shares(figures), shares(speeds or {})

    def count(name: str, label: str) -> None:
        speed = "-" if speeds is None else f"{speeds.get(name, 0):,.1f}/s"
        table.add_row(label, f"{figures.get(name, 0):,.0f}", speed)

    for name in _SERVED:
        count(name, name.replace("_", " "))
    name = "prefix_cache_hit_share"
    table.add_row("prefix-cache hits", _percent(whole[name]), _percent(part[name]))
    if not compresses:
        return table
    table.add_section()
    for name in _COMPRESSED:
        count(name, name.replace("_", " "))
    name = "retained_share"
    table.add_row("tokens retained", _percent(whole[name]), _percent(part[name]))
    name = "seconds_per_compression"
    each = (_milliseconds(whole[name]), _milliseconds(part[name]))
    table.add_row("time per compression", *each)
    for name in sorted(figures):
        if name.startswith(SKIPPED) and figures[name]:
            count(name, f"left alone: {name.removeprefix(SKIPPED)}")
    return table


def engine_table(
    engines: Mapping[str, Figures], speeds: Mapping[str, Figures] | None
) -> Table:
    """One row for each engine."""
    table = Table()
    heads = ("running", "waiting", "KV cache", "generated", "compressions", "retained")
    table.add_column("engine", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for engine in sorted(engines, key=lambda name: (len(name), name)):
        figures = engines[engine]
        speed = speeds[engine].get("generation_tokens", 0) if speeds else None
        table.add_row(
            engine,
            f"{figures.get('running', 0):,.0f}",
            f"{figures.get('waiting', 0):,.0f}",
            _percent(figures.get("kv_cache_usage")),
            "-" if speed is None else f"{speed:,.1f}/s",
            f"{figures.get('compressions', 0):,.0f}",
            _percent(shares(figures)["retained_share"]),
        )
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:,.2f} ms"
