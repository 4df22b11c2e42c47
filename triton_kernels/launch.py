"""Launch parameters of kernels: the tables in configs/kernels, by device.

A table maps ``default`` and names of chips, such as ``H100``, to block sizes and
``num_warps``, ``num_stages``. A chip without an entry takes that of its family.
"""

import functools
import json
import logging
import re
from collections.abc import Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable

import torch
import triton

logger = logging.getLogger("vllm.plugins.kv_compression")

# Triton decides when a kernel is decorated, which is when this package is imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)
DEFAULT = "default"
# Chips of one generation, after the one that is measured.
FAMILIES = {
    **dict.fromkeys(("H200", "GH200", "H800", "H20"), "H100"),
    "A800": "A100",
    **dict.fromkeys(("GB200", "B300", "GB300"), "B200"),
}


def parameters(operation: str, device: torch.device) -> Mapping[str, int]:
    """What to launch an operation's kernels with.

    Args:
        operation: Its name.
        device: Where they run.

    Raises:
        ValueError: The table is broken.
    """
    return _entry(operation, _name(device))


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


@functools.cache
def _entry(operation: str, name: str) -> Mapping[str, int]:
    table = read(_folder() / f"{operation}.json")
    for chip in re.findall(r"\w+", name):
        for entry in (chip, FAMILIES.get(chip)):
            if entry in table:
                return table[entry]
    if name:
        _log_once(name)
    return table[DEFAULT]


@functools.cache
def _log_once(name: str) -> None:
    logger.info("KV compression: no launch parameters for %s, default ones", name)


def _folder() -> Traversable:
    return files("vllm_kvcompress.configs") / "kernels"


def read(path: Traversable) -> dict[str, dict[str, int]]:
    """A table, checked: every entry has the default's names and sizes that can be."""
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"launch parameters {path}: {error}") from error
    if not isinstance(table, dict) or not isinstance(table.get(DEFAULT), dict):
        raise ValueError(f"launch parameters {path}: no entry {DEFAULT!r} of names")
    for chip, entry in table.items():
        if not isinstance(entry, dict) or entry.keys() != table[DEFAULT].keys():
            raise ValueError(
                f"launch parameters {path}: entry {chip!r} must have the names of "
                f"{DEFAULT!r}, {', '.join(table[DEFAULT])}"
            )
        for name, value in entry.items():
            if not _valid(name, value):
                raise ValueError(
                    f"launch parameters {path}: {name} of {chip!r} is {value!r}, must "
                    "be a positive integer, of tiles and warps a power of two"
                )
    return table


def _valid(name: str, value: object) -> bool:
    if type(value) is not int or value < 1:
        return False
    return not name.startswith(("BLOCK_", "num_warps")) or value & (value - 1) == 0
