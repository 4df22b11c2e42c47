"""KV cache compression for stock vLLM: ``vllm serve MODEL --kv-compression snapkv``.

vLLM imports this module in every process, so it imports nothing at the top.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM

__version__ = "0.1.0"


def register() -> None:
    """Add flags and models; entry point of the group ``vllm.general_plugins``."""
    from . import models

    models.register()
    _install_args()


def early_hook() -> None:
    """Add the keywords while vLLM is being imported; claims no platform.

    Entry point of the group ``vllm.platform_plugins``, the only one that vLLM
    calls before ``LLM(...)`` looks at its arguments.
    """
    _install_args()


def _install_args() -> None:
    from .engine.early import install_args

    install_args()


def stats(llm: "LLM") -> dict[str, Any]:
    """What compression has done since ``llm`` was made.

    Returns:
        The fields of `vllm_kvcompress.plan.Counters`; without compression, of a model
        whose layers share KV, how many ``layers`` it has and how many ``kv_layers`` of
        them store keys and values of all tokens.

    Raises:
        ConfigError: This ``LLM`` was made without compression.
    """
    from .config import ConfigError
    from .engine.args import config_of
    from .engine.shared_models import kv_layers

    vllm_config = llm.llm_engine.vllm_config
    if config_of(vllm_config) is None:
        if found := kv_layers(vllm_config):
            return dict(zip(("layers", "kv_layers"), found, strict=True))
        raise ConfigError(
            "this LLM has no KV cache compression; make it with "
            'LLM(..., kv_compression="snapkv")'
        )
    # The last pipeline stage knows of all.
    return llm.collective_rpc("kv_compression_stats")[-1]
