"""Result folders to records; what is half-written is used as far as it is whole."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ..errors import ToolError
from .rebuild import rebuilt
from .records import (
    STOCK,
    Arm,
    Bench,
    BenchFolder,
    EvalConfig,
    Group,
    Metrics,
    Prediction,
    Results,
    Run,
)

SCHEMA = 1
CONFIG, ENVIRONMENT = "config.json", "environment.json"
METRICS, PREDICTIONS, RUNS = "metrics.json", "predictions.jsonl", "runs.jsonl"
_OURS = (ENVIRONMENT, METRICS, PREDICTIONS, RUNS)  # beside a config.json

R = TypeVar("R", bound=BaseModel)


def read_results(folders: Sequence[Path]) -> Results:
    """Read all result folders in these folders.

    Raises:
        ToolError: There are none, or one is not in a format that we know.
    """
    results = Results()
    arms: list[Arm] = []
    benches: list[BenchFolder] = []
    for folder in dict.fromkeys(_find(folders)):
        if (folder / RUNS).exists():
            benches += _read_bench(folder, results.notes)
        else:
            arms += _read_arm(folder, results.notes)
    results.benches = _joined(benches)
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        groups.setdefault(arm.config.group, []).append(arm)
    for own in groups.values():
        own.sort(key=lambda arm: (arm.method != STOCK, arm.method, arm.kept_share or 0))
        results.groups.append(Group(own))
        if own[0].method != STOCK:
            results.notes.append(
                f"{results.groups[-1].title}: no stock arm, so no ratios"
            )
    if not (results.groups or results.benches):
        named = ", ".join(map(str, folders))
        why = f" ({results.notes[0]})" if results.notes else ""
        raise ToolError(f"no results of kvcompress eval or bench in {named}{why}")
    return results


def _find(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        if not folder.is_dir():
            wrong = "is not a folder" if folder.exists() else "does not exist"
            raise ToolError(f"{folder} {wrong}")
        for file in sorted(folder.rglob(CONFIG)):
            if any((file.parent / name).exists() for name in _OURS):
                yield file.parent


def _joined(benches: Sequence[BenchFolder]) -> list[Bench]:
    """Folders that differ in their traffic alone belong together."""
    found: dict[tuple, list[list[BenchFolder]]] = {}
    for bench in sorted(benches, key=lambda own: own.runs[0].input_len or 0):
        together = found.setdefault(bench.setting, [])
        for own in together:
            if all(bench.cases.isdisjoint(other.cases) for other in own):
                own.append(bench)
                break
        else:
            together.append([bench])
    return [Bench(own) for together in found.values() for own in together]


def _read_arm(folder: Path, notes: list[str]) -> Iterator[Arm]:
    config = _checked(EvalConfig, _config(folder), str(folder / CONFIG))
    predictions = _lines(folder / PREDICTIONS, Prediction, notes)
    metrics = _metrics(folder / METRICS, notes)
    by_depth = config.depths is not None
    if metrics is None and not predictions:
        notes.append(f"{folder} holds no results yet; left out")
        return
    if metrics is None:
        notes.append(
            f"{folder}: no {METRICS}, made again from {len(predictions)} predictions; "
            "the kept share is not known"
        )
        metrics = rebuilt(predictions, None, by_depth)
    elif predictions and len(predictions) != metrics.samples:
        notes.append(
            f"{folder}: {METRICS} is of {metrics.samples} samples, {PREDICTIONS} holds "
            f"{len(predictions)}, which count"
        )
        metrics = rebuilt(predictions, metrics, by_depth)
    elif not metrics.complete:
        notes.append(f"{folder} is not complete: {metrics.samples} samples so far")
    environment = _environment(folder, notes)
    yield Arm(str(folder), config, metrics, predictions, environment)


def _metrics(file: Path, notes: list[str]) -> Metrics | None:
    if not file.exists():
        return None
    try:
        values = json.loads(_text(file))
    except json.JSONDecodeError:
        notes.append(f"{file} is half-written and not used")
        return None
    if isinstance(values, dict) and values.get("samples") == 0:
        return None  # the arm has begun, and answered nothing yet
    return _checked(Metrics, values, str(file))


def _read_bench(folder: Path, notes: list[str]) -> Iterator[BenchFolder]:
    config = _config(folder)
    runs = _lines(folder / RUNS, Run, notes)
    if not runs:
        notes.append(f"{folder} holds no runs yet; left out")
        return
    for run in runs:
        if run.failed:
            notes.append(
                f"{folder}: {run.failed} requests failed in a run of {run.arm}"
            )
    merged: dict[tuple, list[Run]] = {}
    for run in runs:
        merged.setdefault((run.arm, run.case, run.load), []).append(run)
    medians = [_median(same) for same in merged.values()]
    yield BenchFolder(str(folder), config, medians, _environment(folder, notes))


def _median(runs: Sequence[Run]) -> Run:
    """Repeated runs as one, of the median of each figure."""
    first = runs[0]
    figures: dict[str, Any] = {}
    for name in type(first).model_fields:
        values = [getattr(run, name) for run in runs]
        if all(isinstance(value, float) for value in values):
            figures[name] = median(values)
    failed = sum(run.failed for run in runs)
    return first.model_copy(update={**figures, "failed": failed, "repeats": len(runs)})


def _lines(file: Path, record: type[R], notes: list[str]) -> list[R]:
    """The records of a file of lines, without lines that were cut off."""
    if not file.exists():
        return []
    found: list[R] = []
    torn = 0
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            torn += 1
            continue
        found.append(_checked(record, values, f"{file} line {number}"))
    if torn:
        lines = "1 line is" if torn == 1 else f"{torn} lines are"
        notes.append(f"{file}: {lines} cut off and left out; {len(found)} are whole")
    return found


def _config(folder: Path) -> dict[str, Any]:
    """A config.json of a version that we know."""
    file = folder / CONFIG
    try:
        values = json.loads(_text(file))
    except json.JSONDecodeError:
        raise ToolError(
            f"{file} is not JSON; remove {folder} or run it again"
        ) from None
    if not isinstance(values, dict):
        raise ToolError(f"{file} is not a JSON object")
    if (version := values.get("schema", SCHEMA)) != SCHEMA:
        raise ToolError(
            f"{file} has schema {version!r}; this version reads {SCHEMA}; "
            "use the vllm-kvcompress that wrote it"
        )
    return values


def _environment(folder: Path, notes: list[str]) -> dict[str, Any]:
    file = folder / ENVIRONMENT
    try:
        values = json.loads(_text(file)) if file.exists() else None
    except json.JSONDecodeError:
        values = None
    if isinstance(values, dict):
        return values
    notes.append(f"{file} is missing or half-written: the machine is not known")
    return {}


def _checked(record: type[R], values: Any, place: str) -> R:
    try:
        return record.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "value"
        raise ToolError(f"{place}: {where}: {first['msg']}") from None


def _text(file: Path) -> str:
    """A file's text, even if its last character was cut in two."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ToolError(f"{file} cannot be read: {error.strerror}") from None
