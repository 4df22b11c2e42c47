"""The folder of one arm: what was asked, how it was answered, what came of it.

Answers are appended as they come, so a run that was stopped goes on where it was: a
folder's name holds a hash of its configuration, and the same command finds it again.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from ..errors import ToolError

SCHEMA = 1
CONFIG, ENVIRONMENT, METRICS = "config.json", "environment.json", "metrics.json"
PREDICTIONS, REFERENCE, LOG = "predictions.jsonl", "reference.jsonl", "engine.log"

Record = dict[str, Any]
Key = tuple[str, int, int]


def key_of(record: Mapping[str, Any]) -> Key:
    """Which sample a line is about: task, length and number."""
    return record["task"], record["length"], record["sample"]


def digest(settings: Mapping[str, Any]) -> str:
    """A short hash that does not depend on the order of keys."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def folder_name(config: Mapping[str, Any]) -> str:
    """The configuration in a few words, and a hash of all of it."""
    tasks = config["tasks"]
    what = "+".join(tasks) if len(tasks) <= 3 else f"{len(tasks)}-tasks"
    words = re.sub(r"[^\w.=+]+", "-", f"{what} {config['label']}")
    return f"{words}-{digest(config)}"


class Folder:
    """An arm's folder while its arm runs; a context, since one run at a time writes.

    Attributes:
        path: Where it is.
        config: What the arm is.
        predictions: What is written of it so far.
        references: The beginnings of stock's answers and their logprobs, by sample.
    """

    def __init__(self, root: Path, config: Record) -> None:
        """Make it, or find it again.

        Raises:
            ToolError: It cannot be written, belongs to another configuration, or to
                a run that is still going on.
        """
        self.config = {"schema": SCHEMA, **config}
        self.path = root / folder_name(self.config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / PREDICTIONS).open("ab")
        except OSError as error:
            reason = error.strerror
            raise ToolError(f"--out {self.path} cannot be written: {reason}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ToolError(f"{self.path} is being written by another run") from None
        self._check_config()
        self.predictions = self._lines(PREDICTIONS)
        self.references = {key_of(line): line for line in self._lines(REFERENCE)}

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _check_config(self) -> None:
        file = self.path / CONFIG
        if not file.exists():
            _replace(file, self.config)
        elif _read(file) != self.config:
            raise ToolError(
                f"{file} differs from what is asked for; give another --out, or move "
                "the folder away"
            )

    def _lines(self, name: str) -> list[Record]:
        """All whole lines of a file; the torn end of a killed run is cut off."""
        file = self.path / name
        if not file.exists():
            return []
        text = file.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.truncate(file, len(whole))
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError:
            raise ToolError(f"{file} is damaged; move its folder away") from None

    @property
    def metrics(self) -> Record | None:
        """What came of it; None if there is nothing yet."""
        file = self.path / METRICS
        return _read(file) if file.exists() else None

    @property
    def complete(self) -> bool:
        """Whether there is nothing left to do."""
        return bool(self.metrics and self.metrics["complete"])

    @property
    def log(self) -> Path:
        """The file for what the engine says."""
        return self.path / LOG

    def environment(self, about: Record) -> None:
        """Say where it was first run."""
        if not (self.path / ENVIRONMENT).exists():
            _replace(self.path / ENVIRONMENT, about)

    def append(self, predictions: list[Record], references: list[Record]) -> None:
        """Add answers, their references first: a line without one would be no use."""
        if references:
            with (self.path / REFERENCE).open("ab") as file:
                _write(file, references)
        self.references.update((key_of(line), line) for line in references)
        _write(self._lock, predictions)
        self.predictions += predictions

    def write_metrics(self, metrics: Record) -> None:
        """Say what came of it so far."""
        _replace(self.path / METRICS, metrics)


def _write(file: IO[bytes], records: Iterable[Record]) -> None:
    file.write("".join(json.dumps(record) + "\n" for record in records).encode())
    file.flush()


def _replace(file: Path, value: Record) -> None:
    """Write a whole file or nothing."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(value, indent=2) + "\n")
    new.replace(file)


def _read(file: Path) -> Record:
    try:
        return json.loads(file.read_text())
    except ValueError:
        raise ToolError(f"{file} is damaged; move its folder away") from None
