"""The commands that a page's results came from, as their configurations tell."""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .records import STOCK, BenchFolder, Group, Results

BUNDLED = "bundled needle model"  # what eval calls the model that it takes by default
SIZES = {"budget": "--budgets", "keep_ratio": "--keep-ratios"}


def eval_commands(results: Results) -> Iterator[str]:
    """One per group and kind of size; a group's other arms share everything else."""
    for group in results.groups:
        yield from _eval(group)


def _eval(group: Group) -> Iterator[str]:
    config = group.arms[0].config
    more = config.model_extra or {}
    depths = [f"{100 * depth:g}" for depth in config.depths or ()]
    common = {
        "--model": None if config.model == BUNDLED else config.model,
        "--url": "URL" if more.get("target") == "url" else None,
        "--tasks": _list(more.get("tasks") or group.tasks),
        "--lengths": _list(more.get("lengths") or ()),
        "--depths": _list(depths),
        "--haystack": more.get("haystack"),
        "--qa-file": more.get("qa_file"),
        "--samples": more.get("samples"),
        "--seed": more.get("seed"),
        "--question": config.question,
        "--fidelity-tokens": more.get("fidelity_tokens"),
        "--engine": _json(more.get("engine")),
    }
    kinds: dict[tuple, dict[str, dict]] = {}
    for arm in group.arms:
        if arm.method != STOCK:
            given = dict(arm.config.settings or {})
            given.pop("method", None)
            size = next((key for key in SIZES if key in given), None)
            # Without one the method varies settings of its own, by default.
            value = given.pop(size) if size else None
            rest = _json(given) if size else None
            kind = kinds.setdefault((size, rest), {"methods": {}, "sizes": {}})
            kind["methods"][arm.method] = kind["sizes"][value] = None
    for (size, rest), kind in kinds.items():
        yield _command(
            "kvcompress eval",
            {
                **common,
                "--methods": _list(kind["methods"]),
                **({SIZES[size]: _list(sorted(kind["sizes"]))} if size else {}),
                "--config": rest,
            },
        )


def bench_commands(results: Results) -> Iterator[str]:
    """One per folder that says what it was made with."""
    for bench in results.benches:
        yield from (_bench(own) for own in bench.folders if "kind" in own.config)


def _bench(own: BenchFolder) -> str:
    config, runs = own.config, own.runs
    traffic, first = config.get("traffic") or {}, runs[0]
    of_files = first.dataset != "random"
    file = (traffic.get("source") or {}).get("file", "FILE")
    recorded = first.dataset == "lengths"
    labels = {run.arm: run.method for run in runs if run.method}
    budgets = {label.partition("budget=")[2] for label in labels} - {""}
    serve = config["kind"] == "serve"
    rates = {r.request_rate for r in runs if r.max_concurrency is None} - {None}
    loads = {r.max_concurrency for r in runs} - {None}
    flags = {
        "--model": config.get("model"),
        "--methods": _list(dict.fromkeys(labels.values())),
        "--budgets": _list(sorted(budgets, key=int)),
        "--no-fp8": None if any("fp8" in run.arm for run in runs) else "",
        "--engine": _json(config.get("engine")),
        "--bench": _json(config.get("bench")),
        "--request-rates": _list(sorted(rates)) if serve else None,
        "--concurrencies": _list(sorted(loads)) if serve else None,
        "--dataset": first.dataset if of_files and not recorded else None,
        "--dataset-path": file if of_files and not recorded else None,
        "--lengths-from": file if recorded else None,
        "--input-len": first.input_len,
        "--output-len": first.output_len,
        "--range-ratio": traffic.get("random_range_ratio") or None,
        "--num-prompts": config.get("num_prompts"),
        "--warmups": config.get("warmups"),
        "--seed": config.get("seed"),
    }
    return _command(f"kvcompress bench {config['kind']}", flags)


def _list(values: Iterable[Any]) -> str | None:
    return (
        ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values) or None
    )


def _json(values: Mapping[str, Any] | None) -> str | None:
    return json.dumps(values) if values else None


def _command(name: str, flags: Mapping[str, Any]) -> str:
    """A command line, without the flags that are None; empty ones take no value."""
    words = [
        flag if value == "" else f"{flag} {shlex.quote(str(value))}"
        for flag, value in flags.items()
        if value is not None
    ]
    return " ".join([name, *words])
