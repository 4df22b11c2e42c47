"""Models from whose layers tokens can be pruned while a prompt is read."""

# Their decoder layers take (positions, hidden_states, residual).
ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
# Language models with such layers inside multimodal ones, by their config's type.
PARTS = (
    "llama",
    "mistral",
    "paddleocr_vl_text",
    "qwen2",
    "qwen2_5_vl_text",
    "qwen2_vl_text",
    "qwen3",
    "qwen3_vl_text",
)


def prunable(architecture: str, part: str | None) -> bool:
    """Whether a model's layers can be pruned.

    Args:
        architecture: Of the model.
        part: The type of the language model inside a multimodal one, None = it is none.
    """
    return architecture in ARCHITECTURES if part is None else part in PARTS
