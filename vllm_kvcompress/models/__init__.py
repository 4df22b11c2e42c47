"""Models that share KV across layers: YOCO, CLA, LCKV; for vLLM and in plain torch."""

METHODS = {
    "yoco": ("YocoForCausalLM", "YocoRetentionForCausalLM"),
    "cla": ("ClaLlamaForCausalLM",),
    "lckv": ("LCKVLlamaForCausalLM", "OptLlamaForCausalLM"),
}
"""What ``--kv-compression`` names and a model is or is not: its architectures."""

ARCHITECTURES = frozenset(name for names in METHODS.values() for name in names)


def register() -> None:
    """Make them known to vLLM and to transformers by name."""
    from vllm import ModelRegistry

    register_configs()
    for name in ARCHITECTURES:
        module = "yoco" if name in METHODS["yoco"] else "shared_llama"
        ModelRegistry.register_model(name, f"{__name__}.{module}:{name}")


def register_configs() -> None:
    """Make their configurations known to transformers alone."""
    from transformers import AutoConfig

    from . import configs

    for config in (
        configs.ClaLlamaConfig,
        configs.LCKVLlamaConfig,
        configs.OptLlamaConfig,
        configs.YocoConfig,
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
