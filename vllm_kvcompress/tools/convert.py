"""`kvcompress convert`: make a model that shares KV out of an ordinary Llama.

The result is where training starts: layers get the mean of what they shared out, see
``vllm_kvcompress/models/convert.py``.
"""

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import positive
from .errors import ToolError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
)
"""What is copied as it is: the tokenizer, the chat template, and how to sample."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="folder of a Llama")
    add("target", type=Path, metavar="DST", help="folder to write to")
    add("--to", required=True, help="cla2, cla3, ..., lckv-w2, lckv-w10, ..., or yoco")
    add(
        "--cla-map",
        default="every",
        help="every, keep_ends, dense_front or dense_back (default %(default)s)",
    )
    add("--layer-types", help="a map of your own, with --to cla or --to lckv")
    add("--window", type=positive, help="of YOCO's lower half (1024), of LCKV's s")
    add(
        "--retention",
        action="store_true",
        help="gated retention in YOCO's lower half; its gates start from noise",
    )
    add("--passes", type=positive, help="of LCKV over a prompt (default 9)")


def load_weights(folder: Path) -> dict[str, "torch.Tensor"]:
    """All weights of a checkpoint, in one file or several.

    Raises:
        ToolError: A file is missing or cannot be read.
    """
    import json

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = [SINGLE]
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        files = sorted(set(index["weight_map"].values()))
    weights: dict[str, torch.Tensor] = {}
    for name in files:
        if not (folder / name).is_file():
            raise ToolError(f"{folder} has no {name}")
        try:
            weights |= load_file(folder / name)
        except SafetensorError as error:
            raise ToolError(f"{folder / name} cannot be read: {error}") from None
    return weights


def _check_target(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ToolError(f"{folder} exists and is not an empty folder")


def run(args: argparse.Namespace) -> int:
    """Convert.

    Raises:
        ToolError: The source cannot be converted, or the target is in use.
    """
    options = {
        key: getattr(args, key)
        for key in ("cla_map", "layer_types", "window", "retention", "passes")
    }
    config = convert(args.source, args.target, args.to, **options)
    print(
        f"{args.target}: {config.architectures[0]} with {config.num_hidden_layers} "
        "layers. Train it further before use."
    )
    return 0


def convert(source: Path, folder: Path, to: str, **options: Any) -> "PreTrainedConfig":
    """Write the model in ``source``, converted, to ``folder``.

    Args:
        source: Folder of a Llama.
        folder: To be made, or empty.
        to: What it becomes, and
        options: how, as `models.convert.Target` has them.

    Raises:
        ToolError: The source cannot be converted, or the target is in use.
    """
    if not (source / "config.json").is_file():
        raise ToolError(f"{source} is no folder of a model: it has no config.json")
    _check_target(folder)

    from huggingface_hub import save_torch_state_dict
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from ..models.convert import Target, model_class, new_config, new_weights

    try:
        old = AutoConfig.from_pretrained(source)
        config = new_config(old, Target(name=to, **options))
        weights = new_weights(load_weights(source), config)
    except (OSError, ValueError, StrictDataclassError) as error:
        sentence = " ".join(str(error).split())
        raise ToolError(f"{source} cannot be converted: {sentence}") from None
    config.architectures = [model_class(config).__name__]
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    contiguous = {name: weight.contiguous() for name, weight in weights.items()}
    save_torch_state_dict(contiguous, folder)
    for pattern in COPIED:
        for path in source.glob(pattern):
            shutil.copy(path, folder)
    return config
