"""Models that share KV across layers: YOCO, CLA, LCKV; for vLLM and in plain torch."""

ARCHITECTURES = {
    "ClaLlamaForCausalLM": "shared_llama",
    "LCKVLlamaForCausalLM": "shared_llama",
    "OptLlamaForCausalLM": "shared_llama",
    "YocoForCausalLM": "yoco",
    "YocoRetentionForCausalLM": "yoco",
}


def register() -> None:
    """Make them known to vLLM and to transformers by name."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from . import configs

    for config in (
        configs.ClaLlamaConfig,
        configs.LCKVLlamaConfig,
        configs.OptLlamaConfig,
        configs.YocoConfig,
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    for name, module in ARCHITECTURES.items():
        ModelRegistry.register_model(name, f"{__name__}.{module}:{name}")
