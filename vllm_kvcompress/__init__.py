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
        The fields of `vllm_kvcompress.plan.Counters`.

    Raises:
        ConfigError: This ``LLM`` was made without compression.
    """
    from .config import ConfigError
    from .engine.args import config_of

    if config_of(llm.llm_engine.vllm_config) is None:
        raise ConfigError(
            "this LLM has no KV cache compression; make it with "
            'LLM(..., kv_compression="snapkv")'
        )
    return llm.collective_rpc("kv_compression_stats")[0]
