"""Every internal of vLLM that we touch, and how its moving would show.

A seam that is gone is found at start-up, in one sentence, and by a test.
"""

import importlib
import pkgutil

from .functions import FUNCTIONS
from .objects import OBJECTS
from .seam import Seam, moved

__all__ = ["SEAMS", "Seam", "check_engine", "check_imports", "check_runner"]

SEAMS: tuple[Seam, ...] = (*FUNCTIONS, *OBJECTS)

# Modules of the model runners; a process that has none need not import them.
_V1 = ("vllm.v1.worker.gpu_model_runner:", "vllm.v1.worker.gpu_input_batch:")
_V2 = ("vllm.v1.worker.gpu.",)


def check_engine() -> None:
    """Look at every seam outside of the model runners.

    Raises:
        ConfigError: See `Seam.resolve`.
    """
    for seam in SEAMS:
        if not seam.target.startswith(_V1 + _V2):
            seam.resolve()


def check_runner(v2: bool) -> None:
    """Look at the seams of one model runner.

    Raises:
        ConfigError: See `Seam.resolve`.
    """
    for seam in SEAMS:
        if seam.target.startswith(_V2 if v2 else _V1):
            seam.resolve()


def check_imports() -> None:
    """Import this whole room, whose modules name what they need of vLLM.

    Raises:
        ConfigError: vLLM has no longer what one of them imports.
    """
    room = __package__.rpartition(".")[0]
    for module in pkgutil.iter_modules(importlib.import_module(room).__path__):
        try:
            importlib.import_module(f"{room}.{module.name}")
        except ImportError as error:
            if not (error.name or "").startswith("vllm."):
                raise
            raise moved(error.name or "", f"is not as it was ({error.msg})") from None
