"""Shared set-up: the installed package is tested, and kernels run without a GPU."""

import os
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

# Triton reads it when a kernel is decorated, so it must be set before any import.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def _leave_root() -> None:
    """Take the repository root off sys.path, where `python -m pytest` puts it.

    From there a folder `triton_kernels` would shadow the package that vLLM imports.
    """
    try:
        distribution("vllm-kvcompress")
    except PackageNotFoundError:
        return  # not installed: the root is the only place to import it from
    root = Path(__file__).resolve().parent.parent
    sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != root]


_leave_root()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a GPU where there is none."""
    if HAS_GPU:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
