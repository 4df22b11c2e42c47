"""Who runs an operation: its torch meaning, or a kernel that was proven against it.

An operation is a function of torch that defines what is computed. A provider is a
module with kernels of the same names and signatures in its ``KERNELS``, and a function
``refusal`` that says why it cannot serve here. Providers are chosen once, when a worker
has its KV caches: the first that can, in the order of `PROVIDERS`.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Generic, Literal, ParamSpec, TypeVar

import torch

logger = logging.getLogger("vllm.plugins.kv_compression")

Strides = tuple[int, int, int]
P = ParamSpec("P")
R = TypeVar("R")

ALL, AUTO, TORCH = "all", "auto", "torch"
PROVIDERS = {
    "cuda": "vllm_kvcompress.ops.cuda",
    "triton": "vllm_kvcompress.triton_kernels",
    "cpp": "vllm_kvcompress.ops.cpp",
}
_MODULES = (
    *("window_scores", "pool", "select", "compact", "merge", "attend_pages"),
    "row_shift",
)
# Only where they are asked for by name.
ON_REQUEST = {"xformers": "vllm_kvcompress.ops.xformers"}
ProviderName = Literal["auto", "torch", "cuda", "triton", "cpp", "xformers"]


@dataclass(frozen=True)
class Pages:
    """Pages that kernels will meet.

    Attributes:
        dtype: Of the cache.
        block_size: Tokens in a page.
        head_size: Elements of a key; a value has as many.
        keys: Their strides, see `Elements.strides`; None = tiled.
        values: The same.
    """

    dtype: torch.dtype
    block_size: int
    head_size: int
    keys: Strides | None = None
    values: Strides | None = None


@dataclass(frozen=True)
class Setting:
    """What is known when providers are chosen.

    Attributes:
        device: Where operations run.
        pages: Of all layers.
        by_name: Whether a provider was asked for, and may be as slow as it likes.
    """

    device: torch.device
    pages: frozenset[Pages] = frozenset()
    by_name: bool = False


class Operation(Generic[P, R]):
    """A function whose work a provider may do.

    Attributes:
        meaning: The function itself, in torch.
        provider: Whose kernel runs.
    """

    def __init__(self, meaning: Callable[P, R]) -> None:
        functools.update_wrapper(self, meaning)
        self.name, self.meaning = meaning.__name__, meaning
        self.use(TORCH, meaning)
        _OPERATIONS[self.name] = self

    def use(self, provider: str, kernel: Callable[P, R]) -> None:
        """Let a provider's kernel do the work from now on."""
        self.provider, self._run = provider, kernel

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the chosen kernel."""
        return self._run(*args, **kwargs)


_OPERATIONS: dict[str, Operation[Any, Any]] = {}


def operations() -> Mapping[str, Operation[Any, Any]]:
    """All operations by name."""
    for module in _MODULES:
        import_module(f"vllm_kvcompress.ops.{module}")
    return _OPERATIONS


class ProviderError(ValueError):
    """A provider that was asked for by name cannot serve."""


def choose(setting: Setting, wanted: Mapping[str, str]) -> None:
    """Choose every operation's provider, and log the choice with its reasons.

    Args:
        setting: The machine and the pages.
        wanted: Operation -> its provider; `ALL` -> that of all operations that it has
            kernels of. Else, and with `AUTO`, it is the first that can serve.

    Raises:
        ProviderError: What was asked for cannot be had.
    """
    every = operations()
    named = {key: name for key, name in wanted.items() if name != AUTO}
    for_all = named.pop(ALL, None)
    if unknown := sorted(named.keys() - every.keys()):
        raise ProviderError(
            f"there is no operation {unknown[0]}, only {', '.join(sorted(every))}"
        )
    by_name = replace(setting, by_name=True)
    if for_all not in (None, TORCH) and (reason := _refusal(for_all, by_name, None)):
        raise ProviderError(f"{for_all} cannot serve: {reason}")
    refusals: dict[str, str] = {}
    for operation in every.values():
        operation.use(TORCH, operation.meaning)
        asked = named.get(operation.name, for_all)
        for provider in (asked,) if asked else PROVIDERS:
            if provider == TORCH:
                break
            here = by_name if asked else setting
            reason = _refusal(provider, here, operation.name)
            if reason is None:
                kernel = _module(provider).KERNELS[operation.name]
                operation.use(provider, kernel)
                break
            if operation.name in named:
                raise ProviderError(
                    f"{provider} cannot serve {operation.name}: {reason}"
                )
            refusals.setdefault(f"{provider}: {reason}", operation.name)
    _log(list(refusals))


def offers(
    operation: Operation[P, R], setting: Setting
) -> Iterator[tuple[str, Callable[P, R] | None, str | None]]:
    """Every provider of an operation: its name, its kernel, or why there is none."""
    yield TORCH, operation.meaning, None
    for provider in (*PROVIDERS, *ON_REQUEST):
        reason = _refusal(provider, setting, operation.name)
        kernels = {} if reason else _module(provider).KERNELS
        yield provider, kernels.get(operation.name), reason


def _log(refusals: Sequence[str]) -> None:
    chosen: dict[str, list[str]] = {}
    for operation in operations().values():
        chosen.setdefault(operation.provider, []).append(operation.name)
    text = "; ".join(f"{name}: {', '.join(own)}" for name, own in chosen.items())
    if refusals:
        text += f" (not used: {'; '.join(refusals)})"
    _log_once(text)


@functools.cache
def _log_once(text: str) -> None:
    logger.info("KV compression: kernels of %s", text)


def _module(provider: str) -> Any:
    return import_module((PROVIDERS | ON_REQUEST)[provider])


def _refusal(provider: str, setting: Setting, operation: str | None) -> str | None:
    """Why a provider cannot serve an operation, or any; None if it can."""
    try:
        module = _module(provider)
    except (ImportError, OSError) as error:
        return str(error).strip().partition("\n")[0]
    if operation is not None and operation not in module.KERNELS:
        return f"has no {operation}"
    reason: str | None = module.refusal(setting, operation)
    return reason
