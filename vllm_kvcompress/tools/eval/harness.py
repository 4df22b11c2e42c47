"""Tasks of lm-evaluation-harness, run by its own vLLM backend in a process per arm."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import ToolError
from .engine import Engine
from .folder import Folder, Record
from .metrics import Done, arm_config
from .plan import Arm

LONGBENCH, PREFIX = "longbench", "lm_eval:"
JOB, OUTPUT = "lm_eval.json", "lm_eval"


def is_harness(task: str) -> bool:
    """Whether it is one of lm-evaluation-harness."""
    return task == LONGBENCH or task.startswith(PREFIX)


def check_installed(task: str) -> None:
    """Raise a `ToolError` if lm-evaluation-harness is missing."""
    if find_spec("lm_eval") is None:
        extra = "[longbench]" if task == LONGBENCH else ""
        raise ToolError(
            f"--tasks {task} needs lm-evaluation-harness; "
            f"pip install 'lm-eval{extra}>=0.4.13'"
        )


@dataclass
class HarnessRunner:
    """Runs one task for arm after arm.

    Attributes:
        root: Folder of the results.
        common: The part of the configuration that all arms share.
        environment: Where this runs.
        task: As given to ``--tasks``.
        engine: Whose keyword arguments the backend passes on to `vllm.LLM`.
    """

    root: Path
    common: Record
    environment: Record
    task: str
    engine: Engine

    def run(self, arm: Arm, report: Callable[[float], None]) -> tuple[Done, bool]:
        """See `runner.Runner.run`; a task that was stopped begins anew."""
        with Folder(self.root, arm_config(arm, self.common)) as folder:
            folder.environment(self.environment)
            found = folder.metrics
            if worked := not (found and found["complete"]):
                start = time.perf_counter()
                results = self._evaluate(arm, folder)
                seconds = round(time.perf_counter() - start, 3)
                folder.write_metrics(found := summary(results, seconds))
            report(1.0)
            return (folder.config, found or {}), worked

    def job(self, arm: Arm, output: Path) -> dict[str, Any]:
        """What lm_eval reads as its ``--config``."""
        keywords = dict(self.engine.keywords(arm.settings))
        return {
            "model": "vllm",
            "model_args": {"pretrained": keywords.pop("model"), **keywords},
            "tasks": [self.task.removeprefix(PREFIX)],
            "batch_size": "auto",
            "limit": self.common["samples"],
            "seed": [self.common["seed"]] * 4,
            "output_path": str(output),
        }

    def _evaluate(self, arm: Arm, folder: Folder) -> dict[str, Any]:
        """Run lm_eval; returns what it has written.

        Raises:
            ToolError: It failed.
        """
        output = (folder.path / OUTPUT).absolute()
        file = folder.path / JOB
        file.write_text(json.dumps(self.job(arm, output), indent=2) + "\n")
        command = [sys.executable, "-P", "-m", "lm_eval", "run", "--config", str(file)]
        with folder.log.open("wb") as log:
            process = subprocess.Popen(
                command,
                env={"VLLM_LOGGING_LEVEL": "WARNING", **os.environ},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            try:
                code = process.wait()
            finally:
                process.kill()
                process.wait()
        written = sorted(output.rglob("results_*.json"))
        if code or not written:
            why = reason(folder.log.read_text(errors="replace"))
            raise ToolError(f"lm_eval failed: {why} (see {folder.log})")
        return json.loads(written[-1].read_text())


def reason(log: str) -> str:
    """The last exception of a log, or else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return (errors or lines or ["it printed nothing"])[-1]


def summary(results: Mapping[str, Any], seconds: float) -> Record:
    """Turn lm_eval's results into the metrics of a folder."""
    by_task = dict(_scores(results))
    if not by_task:
        raise ToolError("lm_eval has written no score")
    count = sum(entry["samples"] for entry in by_task.values())
    total = sum(entry["accuracy"] * entry["samples"] for entry in by_task.values())
    return {
        "complete": True,
        "samples": count,
        "accuracy": total / count,
        "by_task": by_task,
        "cells": [],
        "fidelity": None,
        "kv": None,
        "seconds": seconds,
    }


def _scores(results: Mapping[str, Any]) -> Iterator[tuple[str, Record]]:
    """The first metric of each task; groups, which are means of tasks, are left out."""
    for task, counted in results["n-samples"].items():
        for key, value in results["results"].get(task, {}).items():
            metric, comma, _ = key.partition(",")
            is_score = comma and not metric.endswith("_stderr")
            if is_score and isinstance(value, int | float):
                yield (
                    task,
                    {
                        "accuracy": value,
                        "samples": counted["effective"],
                        "metric": metric,
                        "fidelity": None,
                    },
                )
                break
