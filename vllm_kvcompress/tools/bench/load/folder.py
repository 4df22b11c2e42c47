"""A result folder: named by configuration, never overwritten, taken up again."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import ToolError

SCHEMA = 1
RUNS = "runs.jsonl"
SAME = ("vllm", "vllm_kvcompress", "torch", "cpu", "accelerator")
Record = dict[str, Any]


class ResultFolder:
    """``config.json``, ``environment.json`` and one line per run in ``runs.jsonl``.

    Attributes:
        path: The folder.
        records: The runs that are done.
    """

    def __init__(
        self,
        out: Path,
        name: str,
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
    ) -> None:
        """Make the folder, or open it where an earlier call has left it.

        Raises:
            ToolError: It cannot be written, or was made with other software.
        """
        text = json.dumps({"schema": SCHEMA, **config}, indent=2, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        self.path = out / f"{name}-{digest}"
        with _writing(self.path):
            (self.path / "logs").mkdir(parents=True, exist_ok=True)
            self._write_once("config.json", text)
            self._write_once("environment.json", json.dumps(environment, indent=2))
        self._check_environment(environment)
        self.records = self._read()

    def write(self, name: str, text: str) -> None:
        """Write a file that runs need."""
        with _writing(self.path / name):
            (self.path / name).write_text(text)

    def add(self, record: Record) -> None:
        """Append a run; it is on disk when this returns."""
        with _writing(self.path / RUNS), (self.path / RUNS).open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)

    def log(self, *parts: str) -> Path:
        """Where a process of this run writes what it says."""
        name = "-".join(parts).replace(" ", "-").replace("/", "-")
        return self.path / "logs" / f"{name}.log"

    def _write_once(self, name: str, text: str) -> None:
        file = self.path / name
        if not file.exists():
            beside = file.with_suffix(".part")
            beside.write_text(text + "\n")
            beside.replace(file)

    def _check_environment(self, now: Mapping[str, Any]) -> None:
        made = json.loads((self.path / "environment.json").read_text())
        for key in SAME:
            if made.get(key) != now.get(key):
                raise ToolError(
                    f"{self.path} was begun with {key} {made.get(key)}, and this is "
                    f"{now.get(key)}; choose another --out"
                )

    def _read(self) -> list[Record]:
        """The finished runs; the torn line of an interrupted write is cut off."""
        file = self.path / RUNS
        if not file.exists():
            return []
        whole = file.read_bytes()
        lines = whole[: whole.rfind(b"\n") + 1]
        if len(lines) < len(whole):
            with _writing(file):
                os.truncate(file, len(lines))
        try:
            return [json.loads(line) for line in lines.splitlines()]
        except ValueError:
            raise ToolError(f"{file} is damaged; move it away to start anew") from None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ToolError(f"{path} cannot be written: {error.strerror}") from None
