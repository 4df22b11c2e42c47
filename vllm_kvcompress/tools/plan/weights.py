"""How many bytes a model's weights take, without loading them."""

import json
from pathlib import Path
from typing import Any

from ..convert import INDEX
from ..errors import ToolError
from .model import WRONG


def weight_bytes(source: str, config: Any) -> tuple[int, str]:
    """Count the bytes of a model's weights.

    Args:
        source: As for `plan_model.load`.
        config: From there.

    Returns:
        The bytes, and where the number comes from.

    Raises:
        ToolError: They can be neither found nor estimated.
    """
    folder = Path(source)
    folder = folder.parent if folder.is_file() else folder
    if (total := _index_total(folder / INDEX)) is not None:
        return total, f"total_size of {INDEX}"
    if files := sorted(folder.glob("*.safetensors")):
        return sum(file.stat().st_size for file in files), "size of the weight files"
    return 2 * _parameters(source, config), "estimated from the config, in 16 bits"


def _index_total(index: Path) -> int | None:
    if not index.is_file():
        return None
    try:
        total = json.loads(index.read_text(encoding="utf-8"))["metadata"]["total_size"]
        return int(total)
    except (ValueError, KeyError, TypeError):
        return None


def _parameters(source: str, config: Any) -> int:
    """Build the model without memory, and count."""
    import torch
    from transformers import AutoModelForCausalLM

    text = config.get_text_config(decoder=True)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text)
    except (ImportError, RuntimeError, *WRONG) as error:
        sentence = " ".join(str(error).split()).partition(". ")[0]
        raise ToolError(
            f"the weights of {source} cannot be estimated ({sentence}); give --weights "
            "GiB or --kv-space GiB"
        ) from None
    return sum(parameter.numel() for parameter in model.parameters())
