"""Metrics of predictions, where an arm's own are missing or of other samples."""

from collections.abc import Sequence
from statistics import fmean

from .records import Cell, Fidelity, Metrics, Prediction, TaskResult


def rebuilt(
    predictions: Sequence[Prediction], old: Metrics | None, by_depth: bool
) -> Metrics:
    """Metrics of these predictions; only counters are taken from the old ones."""
    cells: dict[tuple, list[float]] = {}
    tasks: dict[str, list[float]] = {}
    for line in predictions:
        depth = line.depth if by_depth else None
        cells.setdefault((line.task, line.length, depth), []).append(line.score)
        tasks.setdefault(line.task, []).append(line.score)
    return Metrics(
        complete=False,
        accuracy=fmean(line.score for line in predictions),
        samples=len(predictions),
        by_task={
            task: TaskResult(accuracy=fmean(scores), samples=len(scores))
            for task, scores in tasks.items()
        },
        cells=[
            Cell(
                task=task,
                length=length,
                depth=depth,
                accuracy=fmean(scores),
                samples=len(scores),
            )
            for (task, length, depth), scores in cells.items()
        ],
        fidelity=_mean_fidelity([p.fidelity for p in predictions if p.fidelity]),
        kv=old.kv if old else None,
        seconds=old.seconds if old else None,
    )


def _mean_fidelity(parts: Sequence[Fidelity]) -> Fidelity | None:
    """The mean over tokens."""
    tokens = sum(part.tokens for part in parts)
    if not tokens:
        return None
    return Fidelity(
        agreement=sum(part.agreement * part.tokens for part in parts) / tokens,
        kl=sum(part.kl * part.tokens for part in parts) / tokens,
        tokens=tokens,
    )
