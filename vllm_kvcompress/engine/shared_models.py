"""Engines of models that share KV across layers: what they need, and cannot do."""

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from ..config import KEY, ConfigError
from ..models import ARCHITECTURES, METHODS
from .connectors import choose_connector, connector_refusals

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Only names below "vllm" have vLLM's handlers.
logger = init_logger("vllm.kvcompress.models")


def check_method(vllm_config: "VllmConfig", method: str) -> None:
    """Check that ``--kv-compression METHOD`` is how the model is built.

    Raises:
        ConfigError: It is built otherwise.
    """
    architecture = vllm_config.model_config.architecture
    if architecture not in METHODS[method]:
        raise ConfigError(
            f"{KEY}={method} needs a model that is built so ({METHODS[method][0]}), "
            f"not {architecture}; make one with kvcompress convert, or drop the flag"
        )


def prepare(vllm_config: "VllmConfig", wants_prefix_caching: bool) -> None:
    """Refuse what does not work with such a model; tell what it saves.

    Args:
        vllm_config: Of an engine with one of our models.
        wants_prefix_caching: Whether the user asked for it; it is on by default.

    Raises:
        ConfigError: Something that is switched on cannot work.
    """
    choose_connector(vllm_config)
    model = vllm_config.model_config
    parallel = vllm_config.parallel_config
    config: Any = model.hf_config
    name = model.architecture
    yoco = name in METHODS["yoco"]
    approximate = hasattr(config, "use_sequential") and not (
        config.use_sequential or all(not s.repeats for s in config.layer_map.spans)
    )
    refused = [
        (parallel.use_ubatching, "dual batch overlap", "drop --enable-dbo"),
        (
            parallel.decode_context_parallel_size > 1
            or parallel.prefill_context_parallel_size > 1,
            "context parallelism (DCP, PCP)",
            "use size 1",
        ),
        *connector_refusals(vllm_config),
        (
            yoco and config.early_exit and model.runner_type != "generate",
            "pooling and early exit",
            "add --hf-overrides '{\"early_exit\": false}'",
        ),
        (
            approximate and wants_prefix_caching,
            "--enable-prefix-caching and prompts read in a limited number of passes",
            "add --hf-overrides '{\"use_sequential\": true}', or drop that flag",
        ),
    ]
    for used, setting, way_out in refused:
        if used:
            raise ConfigError(f"{name} does not work with {setting}; {way_out}")
    if approximate and vllm_config.cache_config.enable_prefix_caching:
        logger.warning(
            "%s reads prompts in %d passes, so cached prefixes would depend on who "
            "computed them: prefix caching is off. With --hf-overrides "
            "'{\"use_sequential\": true}' it is exact and stays on.",
            name,
            config.passes,
        )
        vllm_config.cache_config.enable_prefix_caching = False
    if prompt_logprobs_refusal(vllm_config):
        from .requests import install

        install()
    layers, stored = kv_layers(vllm_config) or (0, 0)
    logger.info("%s stores KV in %d of %d layers", name, stored, layers)


def kv_layers(vllm_config: "VllmConfig") -> tuple[int, int] | None:
    """Layers of one of our models, and how many of them store KV of all tokens.

    Returns:
        None for any other model.
    """
    if vllm_config.model_config.architecture not in ARCHITECTURES:
        return None
    config: Any = vllm_config.model_config.hf_config
    if hasattr(config, "layer_map"):
        return config.num_hidden_layers, len(config.layer_map.writers)
    return config.num_hidden_layers, 1


def prompt_logprobs_refusal(vllm_config: "VllmConfig") -> str | None:
    """Why no request may ask for logprobs of its prompt, None if it may."""
    model = vllm_config.model_config
    if model.architecture not in METHODS["yoco"] or not model.hf_config.early_exit:
        return None
    return (
        "prompt_logprobs is not possible: prompts do not go through all layers of this "
        "model; start the server with --hf-overrides '{\"early_exit\": false}'"
    )
