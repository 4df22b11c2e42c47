"""The settings on their way into vLLM: flags, keywords and ``additional_config``.

All of them fold into ``additional_config["kv_compression"]``, which vLLM itself
carries to every process and counts in its configuration hash. This is the only
part of vLLM that is wrapped while compression is off.
"""

import functools
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .. import models
from ..config import KEY, ConfigError, KVCompressionConfig
from ..parsing import shown

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SUPPORTED_VLLM = ("0.32", "0.33")


@functools.cache
def install() -> None:
    """Teach ``EngineArgs`` our flags and keywords, once per process."""
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    from .flags import with_flags

    EngineArgs.add_cli_args = staticmethod(with_flags(EngineArgs.add_cli_args))
    EngineArgs.create_engine_config = _with_compression(EngineArgs.create_engine_config)
    for cls in (EngineArgs, AsyncEngineArgs):
        cls.__init__ = _with_keywords(cls.__init__)


def fold(
    additional_config: Mapping[str, Any] | None,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Mapping[str, Any] | None:
    """Put method and settings into ``additional_config``, and check the result.

    Returns:
        A new dict, or ``additional_config`` itself if nothing is given.

    Raises:
        ConfigError: Bad, contradictory or incomplete settings.
    """
    given = _given(additional_config)
    if method is None and settings is None:
        if given is not None:
            _checked(given)
        return additional_config
    if not isinstance(additional_config, Mapping | None):
        raise ConfigError(
            f"additional_config must be a mapping, not {shown(additional_config)}"
        )
    merged: dict[str, Any] = {} if method is None else {"method": method}
    for name, source in ((f"{KEY}_config", settings), (KEY, given)):
        if not isinstance(source, Mapping | None):
            raise ConfigError(f"{name} must be a mapping, not {shown(source)}")
        for key, value in (source or {}).items():
            if key in merged and merged[key] != value:
                raise ConfigError(
                    f"{KEY}: {key} is given twice, as {shown(merged[key])} and as "
                    f"{shown(value)}"
                )
            merged[key] = value
    if "method" not in merged:
        raise ConfigError(
            f"{KEY}_config={shown(merged)} needs a method; "
            "add --kv-compression METHOD (or the keyword kv_compression)"
        )
    _checked(merged)
    return {**(additional_config or {}), KEY: merged}


def config_of(vllm_config: "VllmConfig") -> KVCompressionConfig | None:
    """The compression settings of an engine, None if it does not compress."""
    given = _given(vllm_config.additional_config)
    if given is None or given.get("method") in models.METHODS:
        return None
    return _parsed(json.dumps(given))


def _given(additional_config: Any) -> Any:
    """The settings in ``additional_config``, which may also be an opaque object."""
    if isinstance(additional_config, Mapping):
        return additional_config.get(KEY)
    return None


@functools.lru_cache
def _parsed(settings: str) -> KVCompressionConfig:
    return KVCompressionConfig.from_dict(json.loads(settings))


def _checked(settings: Mapping[str, Any]) -> KVCompressionConfig | None:
    """The settings; None if they only say how the model is built."""
    from vllm import __version__

    if ".".join(__version__.split(".")[:2]) not in SUPPORTED_VLLM:
        raise ConfigError(
            f"{KEY} needs vLLM {' or '.join(SUPPORTED_VLLM)}, not {__version__}; "
            "install one of these or start without compression"
        )
    if isinstance(settings, Mapping) and settings.get("method") in [*models.METHODS]:
        if others := sorted(map(str, settings.keys() - {"method"})):
            raise ConfigError(
                f"{KEY}: {settings['method']} is how a model is built and has no "
                f"settings; drop {', '.join(others)}"
            )
        return None
    return KVCompressionConfig.from_dict(settings)


def _with_keywords(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(
        self: Any,
        *args: Any,
        kv_compression: str | None = None,
        kv_compression_config: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if kv_compression is not None or kv_compression_config is not None:
            kwargs["additional_config"] = fold(
                kwargs.get("additional_config"), kv_compression, kv_compression_config
            )
        init(self, *args, **kwargs)

    return __init__


def _with_compression(create: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = _given(self.additional_config)
        config = None if given is None else _checked(given)
        wants_prefix_caching = self.enable_prefix_caching is True
        vllm_config = create(self, *args, **kwargs)
        if vllm_config.model_config.architecture in models.ARCHITECTURES:
            from .shared_models import prepare

            prepare(vllm_config, wants_prefix_caching)
        if given is not None:
            _switch_on(vllm_config, given["method"], config)
        return vllm_config

    return create_engine_config


def _switch_on(
    vllm_config: "VllmConfig", method: str, config: KVCompressionConfig | None
) -> None:
    if config is None:
        from .shared_models import check_method

        check_method(vllm_config, method)
        return
    # With the defaults filled in, for the logs and the configuration hash.
    vllm_config.additional_config = {
        **vllm_config.additional_config,
        KEY: config.settings(),
    }
    from . import compat

    compat.check_imports()
    from .enable import enable

    enable(vllm_config, config)
