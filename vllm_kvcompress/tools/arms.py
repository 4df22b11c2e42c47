"""Arms of a comparison: the same job, run by differently configured engines.

Each arm runs in a fresh process, so that stock and compressed vLLM never share
one. What sets an arm apart is a dict of keyword arguments for `vllm.LLM`.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import KEY
from .bench.shapes import Prompts
from .engine_run import PROGRESS
from .errors import ToolError
from .trace import Measures, medians


@dataclass(frozen=True)
class Job:
    """What every arm of a comparison does.

    Attributes:
        llm: Keyword arguments for `vllm.LLM`.
        passes: Runs one after the other in one process, each a list of prompts.
        warmup: Prompts that run before, unmeasured.
        max_tokens: Output tokens of each prompt.
    """

    llm: dict[str, Any]
    passes: Sequence[Prompts]
    warmup: Prompts
    max_tokens: int


@dataclass(frozen=True)
class ArmResult:
    """What one arm did.

    Attributes:
        measures: The figures, medians over the passes.
        outputs: Output token ids by pass and prompt.
        compression: The plugin's counters; None for stock vLLM.
        engine: Block size, number of blocks and the like, as vLLM chose them.
    """

    measures: Measures
    outputs: list[list[list[int]]]
    compression: dict[str, Any] | None
    engine: dict[str, Any]


def compressed_arm(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments that switch compression on."""
    return {"additional_config": {KEY: dict(settings)}}


def run_arm(
    name: str,
    job: Job,
    arm: dict[str, Any],
    *,
    report: Callable[[float], None],
    verbose: bool = False,
) -> ArmResult:
    """Run one arm to its end.

    Args:
        name: What to call the arm in errors.
        job: What to run.
        arm: Keyword arguments for `vllm.LLM` on top of the job's.
        report: Told the share that is done, 0 to 1, now and then.
        verbose: Pass vLLM's own output on to stderr.

    Raises:
        ToolError: The engine did not start, failed, or did not compress.
    """
    with tempfile.TemporaryDirectory(prefix="kvcompress-") as folder:
        job_file, result_file = Path(folder, "job.json"), Path(folder, "result.json")
        job_file.write_text(
            json.dumps(
                {
                    "llm": {**job.llm, **arm},
                    "passes": job.passes,
                    "warmup": job.warmup,
                    "max_tokens": job.max_tokens,
                }
            )
        )
        last = _run_process(job_file, result_file, report, verbose)
        if not result_file.exists():
            raise ToolError(f"{name}: the engine process died; its last line: {last}")
        result = json.loads(result_file.read_text())
    if "error" in result:
        raise ToolError(f"{name}: {result['error'].splitlines()[0]}")
    return ArmResult(
        measures=medians(result["measures"]),
        outputs=result["outputs"],
        compression=result["compression"],
        engine=result["engine"],
    )


def _run_process(
    job_file: Path, result_file: Path, report: Callable[[float], None], verbose: bool
) -> str:
    """Run the engine process; returns the last line it printed."""
    # -P: a folder of the working directory must not shadow an installed package.
    command = [sys.executable, "-P", "-m", f"{__package__}.engine_run"]
    lines: deque[str] = deque(maxlen=1)
    process = subprocess.Popen(
        [*command, str(job_file), str(result_file)],
        env={"VLLM_LOGGING_LEVEL": "WARNING", **os.environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        for line in process.stdout or ():
            if line.startswith(PROGRESS):
                report(float(line.removeprefix(PROGRESS)))
                continue
            if line.strip():
                lines.append(line.strip())
            if verbose:
                print(line, end="", file=sys.stderr)
        process.wait()
    finally:
        process.kill()
        process.wait()
    report(1.0)
    return lines[0] if lines else "none"
