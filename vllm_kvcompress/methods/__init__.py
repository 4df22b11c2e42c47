"""The methods by name. Third parties add theirs by an entry point.

An entry point in the group ``vllm_kvcompress.methods`` names a `Scorer` class;
a built-in name cannot be taken over.
"""

import importlib
from importlib.metadata import entry_points

from .base import Scorer

METHODS = {
    "snapkv": "vllm_kvcompress.methods.snapkv:SnapKV",
    "ada_snapkv": "vllm_kvcompress.methods.ada_snapkv:AdaSnapKV",
    "pyramidkv": "vllm_kvcompress.methods.pyramidkv:PyramidKV",
    "pyramidinfer": "vllm_kvcompress.methods.pyramidinfer:PyramidInfer",
    "minicache": "vllm_kvcompress.methods.minicache:MiniCache",
    "streamingllm": "vllm_kvcompress.methods.streamingllm:StreamingLLM",
    "tova": "vllm_kvcompress.methods.tova:TOVA",
    "keydiff": "vllm_kvcompress.methods.keydiff:KeyDiff",
    "knorm": "vllm_kvcompress.methods.knorm:KNorm",
    "rkv": "vllm_kvcompress.methods.rkv:RKV",
    "random": "vllm_kvcompress.methods.random:Random",
}


def method_names() -> list[str]:
    """Names that ``--kv-compression`` takes, built-in ones first."""
    plugged = (e.name for e in entry_points(group="vllm_kvcompress.methods"))
    return [*METHODS, *(name for name in plugged if name not in METHODS)]


def load_method(name: str) -> type[Scorer]:
    """Import a method's class.

    Raises:
        KeyError: No method has this name.
    """
    if name in METHODS:
        module, _, cls = METHODS[name].partition(":")
        return getattr(importlib.import_module(module), cls)
    for entry in entry_points(group="vllm_kvcompress.methods"):
        if entry.name == name:
            return entry.load()
    raise KeyError(name)
