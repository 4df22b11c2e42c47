"""The model that a benchmark runs: the user's, or a small random-weight Llama.

Speed and memory depend on shapes only, so the weights need not mean anything.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ToolError

OWN_FOLDER = Path("build/bench-model")
OWN_SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "vocab_size": 1024,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
    },
    "wide": {
        "vocab_size": 1024,
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "max_position_embeddings": 131072,
    },
    "tall": {
        "vocab_size": 1024,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 22,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "dtype": "bfloat16",
    },
    "deep": {
        "vocab_size": 1024,
        "hidden_size": 1024,
        "intermediate_size": 2752,
        "num_hidden_layers": 40,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
    },
}


@dataclass(frozen=True)
class BenchModel:
    """What the benchmark needs to know of a model.

    Attributes:
        location: Folder or hub name, for vLLM.
        dtype: The checkpoint's own, such as ``float32``.
        vocab_size: Prompts are drawn from it.
        token_bytes: KV bytes of one token over all layers.
        about: What the report says of the model; no paths.
    """

    location: str
    dtype: str
    vocab_size: int
    token_bytes: int
    about: dict[str, Any]


def bench_model(location: str) -> BenchModel:
    """Look at the user's model, or make one of our own by name.

    Raises:
        ToolError: There is no such model.
    """
    from transformers import AutoConfig

    source, name = location, Path(location).name
    if location in OWN_SHAPES:
        folder = OWN_FOLDER / location
        _make(folder, OWN_SHAPES[location])
        source, name = str(folder), f"random-weight Llama, {location}"
    try:
        config = AutoConfig.from_pretrained(source).get_text_config()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ToolError(f"--model {source!r} cannot be read: {reason}") from None
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    vectors = 2 * config.num_hidden_layers * kv_heads  # a key and a value each
    return BenchModel(
        location=source,
        dtype=str(config.dtype).removeprefix("torch."),
        vocab_size=config.vocab_size,
        token_bytes=vectors * head_dim * config.dtype.itemsize,
        about={
            "name": name,
            "dtype": str(config.dtype).removeprefix("torch."),
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "query_heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
        },
    )


def sharing_model(model: BenchModel, to: str, method: str) -> str:
    """The same model, converted to share KV across layers; only the shapes matter.

    Returns:
        Its folder.

    Raises:
        ToolError: It cannot be converted, or the target is not what the method says.
    """
    from .convert import convert

    if not to.startswith(method):
        raise ToolError(f"--to {to} is no {method}")
    folder = OWN_FOLDER / f"{Path(model.location).name}-{to}"
    if not (folder / "config.json").exists():
        convert(Path(model.location), folder, to)
    return str(folder)


def _make(folder: Path, shape: dict[str, Any]) -> None:
    """Write our own model, unless it is there already."""
    if not (folder / "model.safetensors").exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.manual_seed(0)
        config = LlamaConfig(**{"dtype": "float32", **shape})
        LlamaForCausalLM(config).to(config.dtype).save_pretrained(folder)
    if not (folder / "tokenizer.json").exists():
        _make_tokenizer(folder, shape["vocab_size"])


def _make_tokenizer(folder: Path, vocab_size: int) -> None:
    """One word per token, so that a text has as many tokens as it was made of."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{number}": number for number in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
