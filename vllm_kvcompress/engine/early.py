"""Finds the moment at which vLLM's ``EngineArgs`` can be wrapped.

vLLM calls plugins at two times: while it is being imported (platform plugins) and
when an ``EngineArgs`` has already taken its keywords (general plugins). Keywords of
our own need the first one, when ``EngineArgs`` may not exist yet or be half
imported. Python binds a finished submodule to its package, which we watch.
"""

from types import ModuleType
from typing import Any


class _Watched(ModuleType):
    """``vllm.engine`` until ``vllm.engine.arg_utils`` has been imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "arg_utils":
            self.__class__ = ModuleType  # type: ignore[assignment]
            _install()


def install_args() -> None:
    """Wrap ``EngineArgs`` now, or as soon as its module has been imported."""
    import vllm.engine as package

    if hasattr(package, "arg_utils"):
        _install()
    else:
        package.__class__ = _Watched


def _install() -> None:
    from .args import install

    install()
