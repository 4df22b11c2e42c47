"""The `vllm` command: its flags, its processes, and the last thing they said."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import ToolError

STOP_S = 30
TAIL_BYTES = 2**18
PREFIX = re.compile(r"^(\(\S+ pid=\d+\) *)?([A-Z]+ [\d-]+ [\d:]+ \[[^\]]*\] *)?")
MODULE = re.compile(r"^(\w+\.)+(?=\w+: )")
TROUBLE = re.compile(r"\b(\w*(Error|Exception)|error): *\S")
HINTS_AT_OTHERS = "Engine core initialization failed"


def find_vllm() -> str:
    """The command of the vLLM that this Python has.

    Raises:
        ToolError: There is none.
    """
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.exists() else shutil.which("vllm")
    if not found:
        raise ToolError(
            f"there is no `vllm` command beside {sys.executable} nor on the PATH; "
            "install vLLM"
        )
    return found


def flags(keywords: Mapping[str, Any]) -> list[str]:
    """Write keywords as flags; those that are None are left out."""
    words: list[str] = []
    for key, value in keywords.items():
        name = key.replace("_", "-")
        if value is True:
            words.append(f"--{name}")
        elif value is False:
            words.append(f"--no-{name}")
        elif isinstance(value, dict | list):
            words += [f"--{name}", json.dumps(value)]
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


@contextlib.contextmanager
def process(
    command: list[str], log: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command; at the end it and all its children are gone.

    Raises:
        ToolError: The log cannot be written.
    """
    try:
        output = log.open("wb")
    except OSError as error:
        raise ToolError(f"{log} cannot be written: {error.strerror}") from None
    with output:
        child = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # one group to kill, which no Ctrl-C reaches
        )
        try:
            yield child
        finally:
            _stop(child)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ask the command to end, wait, and kill what is left of its group."""
    try:
        if child.poll() is None:
            child.terminate()
            child.wait(STOP_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def last_words(log: Path) -> str:
    """The line of a log that says best why a process ended."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        text = file.read().decode(errors="replace")
    lines = [PREFIX.sub("", line).strip() for line in text.splitlines()]
    lines = [MODULE.sub("", line) for line in lines if line]
    reasons = [
        line for line in lines if TROUBLE.search(line) and HINTS_AT_OTHERS not in line
    ]
    return (reasons or lines or ["it said nothing"])[-1]
