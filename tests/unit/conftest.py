"""Unit tests see what operations mean, whatever an engine has chosen before them."""

import pytest

from vllm_kvcompress.ops.providers import TORCH, operations


@pytest.fixture(autouse=True)
def torch_alone() -> None:
    """Let torch do the work of all operations."""
    for operation in operations().values():
        operation.use(TORCH, operation.meaning)
