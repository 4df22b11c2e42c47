"""Models that share KV, initialised from an ordinary Llama.

The rules are those of LCKV's authors (github.com/whyNLP/LCKV): a layer that writes KV
gets the mean of ``k_proj`` and ``v_proj`` of all layers that read it; everything else
is copied. Answers are poor until the model is trained further.
"""

import re
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .configs import ClaLlamaConfig, LCKVLlamaConfig, YocoConfig
from .convert_yoco import Weights, mean, yoco_config, yoco_weights
from .layer_map import LayerMap
from .reference.llama import ClaLlamaForCausalLM, LCKVLlamaForCausalLM
from .reference.yoco import YocoForCausalLM

LLAMA_TYPES = ("llama", "mistral")
"""Model types whose weights have a Llama's names and mean the same."""

_TARGET = re.compile(r"cla(?P<factor>\d+)?|lckv(-w(?P<ordinary>\d+))?|yoco")
# Of the source's configuration; the rest is told again or is about its file.
_NOT_COPIED = (
    "architectures",
    "auto_map",
    "model_type",
    "layer_types",
    "sliding_window",
    "transformers_version",
    "_name_or_path",
)


@dataclass(frozen=True)
class Target:
    """What a model is to become.

    Attributes:
        name: ``claN`` shares the KV of N layers; ``lckv-wN`` has N ordinary layers,
            half of them at each end; ``yoco``. ``cla`` and ``lckv`` alone go with
            ``layer_types``.
        cla_map: See `ClaLlamaConfig`.
        layer_types: A map of its own, see the configurations.
        window: Of YOCO's self-decoder (1024 if None), and of layers marked ``s``.
        retention: YOCO's self-decoder has gated retention in place of a window.
        passes: Of LCKV over a prompt.
    """

    name: str
    cla_map: str = "every"
    layer_types: str | None = None
    window: int | None = None
    retention: bool = False
    passes: int | None = None


def sandwich(num_layers: int, ordinary: int) -> list[str]:
    """LCKV's ``layer_types`` with half of the ordinary layers at each end.

    Raises:
        ValueError: No two layers are left to share.
    """
    if not 0 <= ordinary <= num_layers - 2:
        raise ValueError(
            f"lckv-w{ordinary} needs at least {ordinary + 2} layers; "
            f"this model has {num_layers}"
        )
    top = num_layers - ordinary // 2
    bottom = ordinary - ordinary // 2
    middle = [top - 1] * (top - bottom)
    return [str(i) for i in (*range(bottom), *middle, *range(top, num_layers))]


def new_config(source: PreTrainedConfig, target: Target) -> PreTrainedConfig:
    """The configuration of the converted model.

    Raises:
        ValueError: The source cannot be converted, or not to that.
    """
    if source.model_type not in LLAMA_TYPES:
        raise ValueError(
            f"model_type {source.model_type!r} is none of {', '.join(LLAMA_TYPES)}"
        )
    if getattr(source, "quantization_config", None):
        raise ValueError("it is quantised; convert the model before quantisation")
    if window := getattr(source, "sliding_window", None):
        raise ValueError(f"all its layers have a sliding window of {window} tokens")
    _check(target)
    if target.name == "yoco":
        return yoco_config(source, target.window, target.retention)
    kept = {k: v for k, v in source.to_dict().items() if k not in _NOT_COPIED}
    layers, types = source.num_hidden_layers, target.layer_types
    if target.name.startswith("cla"):
        return ClaLlamaConfig(
            **kept,
            layer_types=types,
            cla_map=target.cla_map,
            cla_share_factor=int(target.name.removeprefix("cla") or 2),
        )
    if types is None:
        types = "_".join(sandwich(layers, int(target.name.removeprefix("lckv-w"))))
    passes = 9 if target.passes is None else target.passes
    return LCKVLlamaConfig(
        **kept,
        layer_types=types,
        sliding_window=target.window or 4096,
        forward_passes=max(0, passes - 2),
        backward_passes=min(2, passes),
    )


def _check(target: Target) -> None:
    """See `new_config`; the same about the target alone."""
    name = target.name
    if not (match := _TARGET.fullmatch(name)):
        raise ValueError(f"{name!r} is none of cla2, cla3, ..., lckv-w2, ..., and yoco")
    numbered = any(number is not None for number in match.groupdict().values())
    if name != "yoco" and numbered == (target.layer_types is not None):
        raise ValueError(
            f"{name!r} needs either a number, such as cla2 or lckv-w2, or layer_types"
        )
    idle = {
        "layer_types": target.layer_types is not None and name == "yoco",
        "cla_map": target.cla_map != "every" and not name.startswith("cla"),
        "window": target.window is not None and name.startswith("cla"),
        "retention": target.retention and name != "yoco",
        "passes": target.passes is not None and not name.startswith("lckv"),
    }
    if unused := [setting for setting, is_so in idle.items() if is_so]:
        raise ValueError(f"{unused[0]} means nothing for {name}")
    if target.retention and target.window is not None:
        raise ValueError("retention takes the place of the window")


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The reference that runs a configuration of `new_config`."""
    for model in (ClaLlamaForCausalLM, LCKVLlamaForCausalLM, YocoForCausalLM):
        if model.config_class is type(config):
            return model
    raise ValueError(f"no model has a {type(config).__name__}")


def new_weights(weights: Weights, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """The weights of the converted model, in the dtype of the source's.

    Args:
        weights: The Llama's, under their ordinary names.
        config: Of `new_config`.

    Raises:
        ValueError: Weights are missing or have other shapes.
    """
    weights = {k: v for k, v in weights.items() if "rotary_emb" not in k}
    try:
        if isinstance(config, YocoConfig):
            made = yoco_weights(weights, config)
        else:
            made = _shared_weights(weights, config.layer_map)
    except KeyError as error:
        raise ValueError(f"the weight {error} is missing") from None
    with torch.device("meta"):
        wanted = model_class(config)(config).state_dict()
    if config.tie_word_embeddings:
        made.pop("lm_head.weight", None)
        wanted.pop("lm_head.weight")
    if odd := sorted(wanted.keys() ^ made.keys()):
        what = "is missing" if odd[0] in wanted else "has no place in the new model"
        raise ValueError(f"the weight {odd[0]} {what}")
    for name, weight in made.items():
        if weight.shape != wanted[name].shape:
            raise ValueError(
                f"{name} would be {list(weight.shape)}, but the new model has "
                f"{list(wanted[name].shape)}"
            )
    return made


def _shared_weights(weights: Weights, layer_map: LayerMap) -> dict[str, torch.Tensor]:
    made = {k: v for k, v in weights.items() if not re.search(r"\.[kv]_proj\.", k)}
    for owner in layer_map.writers:
        for part in ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"):
            names = [
                f"model.layers.{reader}.self_attn.{part}"
                for reader in layer_map.readers(owner)
            ]
            if part.endswith("weight") or names[0] in weights:
                found = mean([weights[name] for name in names])
                made[f"model.layers.{owner}.self_attn.{part}"] = found
    return made
