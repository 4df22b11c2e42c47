"""Small random models that look at pictures, and pictures for them.

No weights or processors of the hub are needed; images are prepared by PIL.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

VOCAB = 512
PATCH = 8
SIDES = {"wide": (48, 96), "small": (32, 48)}
"""Height and width of pictures, where a model takes them as they are."""
AREA = {"shortest_edge": 16 * 16, "longest_edge": 96 * 96}
SPECIAL = [
    *("<image>", "<|image_pad|>", "<|video_pad|>", "<start>", "<end>"),
    *("<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
]
TOKEN = {word: VOCAB - 1 - number for number, word in enumerate(SPECIAL)}
WORDS = VOCAB - len(SPECIAL)
"""Ordinary tokens are smaller."""

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# Of a rotary pair's 16 angles: time, height, width.
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}


def picture(seed: int, size: str = "small") -> Any:
    """Coloured noise, in tiles of which a patch sees several."""
    from PIL import Image

    height, width = SIDES[size]
    noise = np.random.default_rng(seed).integers(
        0, 256, (height // 4, width // 4, 3), dtype=np.uint8
    )
    return Image.fromarray(noise.repeat(4, 0).repeat(4, 1))


def _sharpened(model: Any, path: Path) -> None:
    """Attention that is sharp shows lost keys; loud pictures show everywhere."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2:
                continue
            if "visual" in name or "vision" in name or "projector" in name:
                weight.normal_(std=2.0 / weight[0].numel() ** 0.5)
            elif "q_proj" in name or "k_proj" in name:
                weight.mul_(6.0)
            else:
                weight.mul_(4.0)
    model.save_pretrained(path)


def _rename(path: Path, prefix: str, wanted: str) -> None:
    """Call weights as vLLM does, and published checkpoints do."""
    from safetensors.torch import load_file, save_file

    file = path / "model.safetensors"
    named = {name.replace(prefix, wanted): w for name, w in load_file(file).items()}
    save_file(named, file, metadata={"format": "pt"})


def tokenizer(path: Path, image: str) -> Any:
    """A word for every token, ``<0>``, ``<1>`` and so on; the last ones are special."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"<{number}>": number for number in range(WORDS)} | TOKEN
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<0>",
        eos_token="<1>",
        pad_token="<2>",
        extra_special_tokens={"image_token": image},
    )
    fast.add_special_tokens({"additional_special_tokens": SPECIAL})
    fast.save_pretrained(path)
    return fast


def save_llava(path: Path) -> Path:
    """LLaVA: CLIP's tower over 16 patches, a Llama, ordinary positions."""
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    side = 4 * PATCH
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=PATCH,
        projection_dim=64,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT, head_dim=32),
        image_token_index=TOKEN["<image>"],
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    _sharpened(LlavaForConditionalGeneration(config), path)
    _rename(path, "vision_tower.", "vision_tower.vision_model.")
    size = {"height": side, "width": side}
    LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer(path, "<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    ).save_pretrained(path)
    return path


def _save_qwen(path: Path, kind: str, vision: dict[str, Any], text: Any) -> Path:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        text_config={**TEXT, **text},
        vision_config={
            "depth": 2,
            "num_heads": 2,
            "patch_size": PATCH,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            **vision,
        },
        image_token_id=TOKEN["<|image_pad|>"],
        video_token_id=TOKEN["<|video_pad|>"],
        vision_start_token_id=TOKEN["<start>"],
        vision_end_token_id=TOKEN["<end>"],
        tie_word_embeddings=False,
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    _sharpened(model, path)
    prepared: dict[str, Any] = {"patch_size": PATCH, "merge_size": 2, "size": AREA}
    getattr(transformers, f"{kind}Processor")(
        transformers.Qwen2VLImageProcessorPil(**prepared),
        tokenizer(path, "<|image_pad|>"),
        getattr(transformers, f"{kind}VideoProcessor")(**prepared),
    ).save_pretrained(path)
    return path


def save_qwen2_vl(path: Path) -> Path:
    """Qwen2-VL: positions of three parts, pictures of any size."""
    vision = {"embed_dim": 64, "hidden_size": 128, "mlp_ratio": 1}
    return _save_qwen(path, "Qwen2VL", vision, {"rope_parameters": MROPE})


def save_qwen3_vl(path: Path) -> Path:
    """Qwen3-VL: the same, and pictures enter behind both layers once more."""
    vision = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "out_hidden_size": 128,
        "num_position_embeddings": 144,
        "deepstack_visual_indexes": [0, 1],
    }
    rope = {**MROPE, "mrope_interleaved": True}
    return _save_qwen(
        path, "Qwen3VL", vision, {"rope_parameters": rope, "head_dim": 32}
    )


def save_idefics3(path: Path) -> Path:
    """Idefics3: a tower over 64 patches, of which 16 tokens become; a Llama."""
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
    )

    torch.manual_seed(0)
    side = {"longest_edge": 8 * PATCH}
    config = Idefics3Config(
        text_config={**TEXT, "model_type": "llama", "head_dim": 32},
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 8 * PATCH,
            "patch_size": PATCH,
        },
        image_token_id=TOKEN["<image>"],
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    _sharpened(Idefics3ForConditionalGeneration(config), path)
    Idefics3Processor(
        Idefics3ImageProcessorPil(
            size=side, max_image_size=side, do_image_splitting=False
        ),
        tokenizer(path, "<image>"),
        image_seq_len=16,
    ).save_pretrained(path)
    return path


def save_paddleocr_vl(path: Path) -> Path:
    """PaddleOCR-VL: positions of three parts, pictures of any size; an Ernie 4.5."""
    from transformers import (
        PaddleOCRVLConfig,
        PaddleOCRVLForConditionalGeneration,
        PaddleOCRVLImageProcessorPil,
        PaddleOCRVLProcessor,
    )

    torch.manual_seed(0)
    config = PaddleOCRVLConfig(
        text_config={**TEXT, "head_dim": 32, "rope_parameters": MROPE},
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 12 * PATCH,
            "patch_size": PATCH,
        },
        image_token_id=TOKEN["<|image_pad|>"],
        video_token_id=TOKEN["<|video_pad|>"],
        vision_start_token_id=TOKEN["<start>"],
        vision_end_token_id=TOKEN["<end>"],
        tie_word_embeddings=False,
    )
    _sharpened(PaddleOCRVLForConditionalGeneration(config), path)
    words = tokenizer(path, "<|image_pad|>")
    images = PaddleOCRVLImageProcessorPil(patch_size=PATCH, merge_size=2, size=AREA)
    PaddleOCRVLProcessor(images, words).save_pretrained(path)
    return path


@dataclass(frozen=True)
class Family:
    """Models of a kind.

    Attributes:
        save: Writes a small one.
        written: Tokens that users write for a picture.
        read: Tokens that the model reads for one, by its height and width.
        torchvision: Whether vLLM and transformers want that for it.
    """

    save: Callable[[Path], Path]
    written: list[int]
    read: Callable[[int, int], list[int]]
    torchvision: bool = False


def _tokens(*words: str) -> list[int]:
    return [TOKEN[word] for word in words]


def _merged(height: int, width: int) -> list[int]:
    """One token for four patches."""
    count = height * width // (2 * PATCH) ** 2
    return _tokens("<start>", *["<|image_pad|>"] * count, "<end>")


_FAKE, _GLOBAL = "<fake_token_around_image>", "<global-img>"
_ONE = _tokens("<start>", "<|image_pad|>", "<end>")
FAMILIES = {
    "idefics3": Family(
        save_idefics3,
        _tokens("<image>"),
        lambda *_: _tokens(_FAKE, _GLOBAL, *["<image>"] * 16, _FAKE),
    ),
    "paddleocr_vl": Family(save_paddleocr_vl, _ONE, _merged),
    "llava": Family(
        save_llava, _tokens("<image>"), lambda *_: _tokens("<image>") * 16, True
    ),
    "qwen2_vl": Family(save_qwen2_vl, _ONE, _merged, True),
    "qwen3_vl": Family(save_qwen3_vl, _ONE, _merged, True),
}


@dataclass(frozen=True)
class Prompt:
    """Words and pictures.

    Attributes:
        given: What vLLM takes.
        tokens: What the model reads.
        pictures: In their order.
    """

    given: dict[str, Any]
    tokens: list[int]
    pictures: list[Any]


def write(family: Family, *parts: Any) -> Prompt:
    """A prompt of lists of tokens, and of pictures."""
    given, tokens, pictures = list[int](), list[int](), []
    for part in parts:
        if isinstance(part, list):
            given, tokens = given + part, tokens + part
        else:
            given = given + family.written
            tokens = tokens + family.read(part.height, part.width)
            pictures.append(part)
    data = {"multi_modal_data": {"image": pictures}} if pictures else {}
    return Prompt({"prompt_token_ids": given, **data}, tokens, pictures)
