"""An arm answered by an engine of its own, in a fresh process.

Stock and compressed vLLM never share one. The process writes its waves into a pipe,
line by line, and ends when nobody reads them any more.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...config import KEY
from ..errors import ToolError
from .conversation import Rules
from .plan import Arm, Settings
from .target import Wave, Work

PROCESSOR = f"{__package__}.forced:ForcedTokens"


@dataclass(frozen=True)
class Engine:
    """How engines are made, all alike but for the arm's own settings.

    Attributes:
        llm: Keyword arguments for `vllm.LLM`.
        batch: Questions that are answered together.
    """

    llm: dict[str, Any]
    batch: int

    def keywords(self, settings: Settings | None) -> dict[str, Any]:
        """The arm's keyword arguments for `vllm.LLM`."""
        if settings is None:
            return self.llm
        others = self.llm.get("additional_config", {})
        return {**self.llm, "additional_config": {**others, KEY: settings}}

    def waves(self, arm: Arm, work: Work, rules: Rules, log: Path) -> Iterator[Wave]:
        """See `Target`; what the engine prints goes to ``log``."""
        job = {
            "llm": self.keywords(arm.settings),
            "compresses": arm.settings is not None,
            "batch": self.batch,
            "rules": asdict(rules),
            "work": [(asdict(asked), known and asdict(known)) for asked, known in work],
        }
        with tempfile.TemporaryDirectory(prefix="kvcompress-") as folder:
            file = Path(folder, "job.json")
            file.write_text(json.dumps(job))
            for line in _run_process(file, log):
                if "error" in line:
                    raise ToolError(f"{line['error']} (see {log})")
                yield Wave(**line)


def _run_process(job: Path, log: Path) -> Iterator[dict[str, Any]]:
    """Run the engine process; yields the lines it writes.

    Raises:
        ToolError: It ended without saying why.
    """
    receiver, sender = os.pipe()
    # -P: a folder of the working directory must not shadow an installed package.
    command = [sys.executable, "-P", "-m", f"{__package__}.engine_process"]
    with log.open("ab") as output, os.fdopen(receiver) as lines:
        process = subprocess.Popen(
            [*command, str(job), str(sender)],
            env={"VLLM_LOGGING_LEVEL": "WARNING", **os.environ},
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(sender,),
        )
        os.close(sender)
        try:
            for line in lines:
                if not line.endswith("\n"):
                    break
                yield json.loads(line)
            if code := process.wait():
                raise ToolError(f"the engine process died, status {code}; see {log}")
        finally:
            process.kill()
            process.wait()
