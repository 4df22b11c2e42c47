"""One place of vLLM that we touch, and whether it is still there."""

import dis
import importlib
import inspect
from dataclasses import dataclass

from ...config import KEY, ConfigError

V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"


@dataclass(frozen=True)
class Seam:
    """One place of vLLM 0.32 that is not a documented plugin interface.

    Attributes:
        target: ``module:attribute`` path.
        why: What we use it for.
        gone_when: When we could do without.
        parameters: Parameter names that must exist there.
        attributes: What objects of a class must have, or what a function gives them.
    """

    target: str
    why: str
    gone_when: str
    parameters: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()

    def resolve(self) -> object:
        """The object behind it.

        Raises:
            ConfigError: It is gone, or has lost a parameter or an attribute.
        """
        module, _, path = self.target.partition(":")
        try:
            found: object = importlib.import_module(module)
            for name in path.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError):
            raise moved(self.target, "is gone") from None
        if self.parameters:
            has = inspect.signature(found).parameters  # type: ignore[arg-type]
            self._all_of("takes", self.parameters, {*has})
        if self.attributes:
            lacking = {*self.attributes} - {*dir(found)}
            self._all_of("sets", tuple(lacking), _set_by(found, lacking))
        return found

    def _all_of(self, verb: str, wanted: tuple[str, ...], found: set[str]) -> None:
        if missing := sorted({*wanted} - found):
            raise moved(self.target, f"{verb} no {', '.join(missing)}")


def moved(what: str, how: str) -> ConfigError:
    """The error for a part of vLLM that is not where it was."""
    return ConfigError(
        f"{KEY}: vLLM's {what} {how} in this version; install vLLM 0.32, "
        "or start without --kv-compression"
    )


def _set_by(found: object, names: set[str]) -> set[str]:
    """Those of ``names`` that a class declares, or that its code or a function sets.

    A buffer's name is a string there.
    """
    classes = found.__mro__ if isinstance(found, type) else ()
    declared = [base.__dict__.get("__annotations__", {}) for base in classes]
    members = [member for base in classes for member in vars(base).values()] or [found]
    codes = [getattr(inspect.unwrap(each), "__code__", None) for each in members]
    known = {name for own in declared for name in own}
    for code in codes:
        if code is not None:
            known |= {text for text in code.co_consts if isinstance(text, str)}
            if not names.isdisjoint(code.co_names):
                stores = dis.get_instructions(code)
                known |= {s.argval for s in stores if s.opname == "STORE_ATTR"}
    return names & known
