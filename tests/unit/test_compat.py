"""The seams of vLLM that we touch are where we expect them, and all are named."""

import ast
import dataclasses
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from vllm_kvcompress import engine
from vllm_kvcompress.config import ConfigError
from vllm_kvcompress.engine import compat
from vllm_kvcompress.engine.check import seams

pytestmark = [pytest.mark.compat, pytest.mark.vllm]

SEAMS = [*compat.SEAMS, *seams.SEAMS]
ABC = "_abc_impl"  # of every abstract class
ROOM = Path(engine.__file__).parent
# Documented for those who bring a class of their own.
INTERFACES = {
    "vllm.v1.attention.backend",
    "vllm.v1.metrics.loggers",
    "vllm.v1.outputs",
}


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.target)
def test_seam_is_there(seam: compat.Seam) -> None:
    seam.resolve()
    assert seam.why and seam.gone_when


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "vllm.v1.core.block_pool:BlockPool.nothing"}, "is gone"),
        ({"target": "vllm.v1.nowhere:BlockPool"}, "is gone"),
        ({"parameters": ("block", "colour")}, "takes no colour"),
    ],
)
def test_a_moved_seam_is_found(change: dict, message: str) -> None:
    seam = next(s for s in compat.SEAMS if "_maybe_evict" in s.target)
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(seam, **change).resolve()


@pytest.mark.parametrize(
    "seam", [s for s in SEAMS if s.attributes], ids=lambda seam: seam.target
)
def test_a_lost_attribute_is_found(seam: compat.Seam) -> None:
    lost = dataclasses.replace(seam, attributes=(*seam.attributes, "colour"))
    with pytest.raises(ConfigError, match="sets no colour in this version"):
        lost.resolve()


def test_a_lost_import_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1 import request

    from vllm_kvcompress.engine import usage

    monkeypatch.delitem(sys.modules, usage.__name__)
    monkeypatch.delattr(request, "Request")
    with pytest.raises(ConfigError, match=r"vllm\.v1\.request is not as it was"):
        compat.check_imports()


def _modules() -> Iterator[tuple[ModuleType, ast.Module]]:
    for path in sorted(ROOM.rglob("*.py")):
        name = ".".join(path.relative_to(ROOM).with_suffix("").parts)
        if "__init__" not in name:
            module = importlib.import_module(f"{engine.__name__}.{name}")
            yield module, ast.parse(path.read_text())


def _bases(cls: type) -> list[type]:
    from vllm.v1.worker import gpu_model_runner as v1
    from vllm.v1.worker.gpu import model_runner as v2

    if cls.__name__ in ("_Runner", "RunnerV1"):  # see `compress_runner`
        return [v1.GPUModelRunner]
    if cls.__name__ == "RunnerV2":
        return [v2.GPUModelRunner]
    return [base for base in cls.__mro__ if base.__module__.startswith("vllm.")]


def test_every_override_is_named() -> None:
    named = {seam.target for seam in SEAMS}
    named |= {f"{s.target}.{name}" for s in SEAMS for name in s.attributes}
    overridden = dict[str, bool]()
    for module, _ in _modules():
        for cls in vars(module).values():
            if not inspect.isclass(cls) or cls.__module__ != module.__name__:
                continue
            for name in vars(cls):
                owners = [base for base in _bases(cls) if hasattr(base, name)]
                public = any(base.__module__ in INTERFACES for base in owners)
                if owners and not (public or name.startswith("__") or name == ABC):
                    targets = {f"{b.__module__}:{b.__name__}.{name}" for b in owners}
                    overridden[f"{cls.__name__}.{name}"] = bool(targets & named)
    assert len(overridden) > 20
    assert [name for name, is_named in overridden.items() if not is_named] == []


def test_every_private_name_is_named() -> None:
    """What starts with an underscore is ours, or in the table."""
    named = {seam.target.replace(":", ".").split(".")[-1] for seam in SEAMS}
    named |= {name for seam in SEAMS for name in seam.attributes}
    ours, used = set[str](), set[str]()
    for _, tree in _modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Attribute) and _private(node.attr):
                own = isinstance(node.value, ast.Name) and node.value.id == "self"
                stored = isinstance(node.ctx, ast.Store)
                (ours if own and stored else used).add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                ours.add(node.id)
    assert len(used & named) > 10
    assert used - ours <= named


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")
