"""Which tokens workers keep, head by head. Imported by scripts that serve."""

from typing import Any

Records = list[list[list[int]]]  # of each selection the tokens of each KV head

_records: dict[str, Records] = {}  # by request
_request = ""


def listen(worker: Any) -> None:
    """Note from now on what is selected; for ``LLM.collective_rpc``."""
    from vllm_kvcompress.engine import executor, merging, pruner, uneven

    _records.clear()
    for module, name in (
        (executor, "select"),
        (merging, "select"),
        (pruner, "select"),
        (uneven, "select_each"),
    ):
        setattr(module, name, _noting(getattr(module, name)))
    compression = worker.model_runner.compression
    compression._execute = _naming(compression._execute, lambda name, *_: name)
    if chooser := compression.pruner:
        chooser._choose = _naming(chooser._choose, lambda *args: args[2].request_id)


def kept(worker: Any) -> dict[str, Records]:
    """What was selected since `listen`, by the request's number."""
    return {name.partition("-")[0]: found for name, found in _records.items()}


def part(found: dict[str, Records], rank: int, workers: int) -> dict[str, Records]:
    """What one of some workers has of what is kept, with its KV heads in order."""
    return {
        name: [_held(heads, rank, workers) for heads in records]
        for name, records in found.items()
    }


def _held(heads: list[list[int]], rank: int, workers: int) -> list[list[int]]:
    first = rank * len(heads) // workers
    return heads[first : first + max(1, len(heads) // workers)]


def _noting(select: Any) -> Any:
    if hasattr(select, "noting"):
        return select

    def noting(*args: Any) -> Any:
        found = select(*args)
        heads = [own.tolist() for own in found]
        _records.setdefault(_request, []).append(heads)
        return found

    noting.noting = True  # type: ignore[attr-defined]
    return noting


def _naming(call: Any, name: Any) -> Any:
    def naming(*args: Any) -> Any:
        global _request
        _request = name(*args)
        return call(*args)

    return naming
