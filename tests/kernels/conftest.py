"""What every test of kernels has: poisoned buffers, and small tiles on request."""

import json
import sys
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what the package allocates, so that what it forgets to write is seen."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _filled(getattr(torch, name)))


def _filled(new: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = new(*args, **kwargs)
        caller = sys._getframe(1).f_globals["__name__"]
        if caller.startswith("vllm_kvcompress."):
            poison = float("nan") if tensor.is_floating_point() else 113
            tensor.fill_(poison)
        return tensor

    return filled


@pytest.fixture(scope="session")
def small_tiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tables whose tiles are small, so that few tokens need several."""
    from vllm_kvcompress.triton_kernels import launch

    folder: Path = tmp_path_factory.mktemp("kernels")
    few = {"PROGRAMS": 24, "MAX_SPLITS": 4, "SPLIT_TOKENS": 32, "BLOCK_COLUMNS": 8}
    for table in (files("vllm_kvcompress.configs") / "kernels").iterdir():
        entry = json.loads(table.read_text())[launch.DEFAULT]
        for name in entry:
            if name.isupper():
                entry[name] = few.get(name, 16)
        (folder / table.name).write_text(json.dumps({launch.DEFAULT: entry}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_folder", lambda: folder)
        launch._entry.cache_clear()
        yield
    launch._entry.cache_clear()
