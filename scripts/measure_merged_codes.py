"""Accuracy of merged and quantised caches on the trained model, in plain torch.

    python scripts/measure_merged_codes.py build/recall-model

Formats with a scale per token need Triton's kernels, whose interpreter is too slow for
this. So transformers computes a prompt's cache, which is merged by `ops.merge` and
quantised as the tests' oracle has it (engines are held to that oracle, to the bit), and
answers are graded as in measure_minicache.py.
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import torch
from train_recall_model import QUESTIONS, sequence
from transformers import AutoModelForCausalLM

from vllm_kvcompress.methods.minicache import MiniCache
from vllm_kvcompress.ops.merge import merge, strangeness
from vllm_kvcompress.ops.select import select

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.quantised import FORMATS, Stored  # noqa: E402

BATCH = 20
SETTINGS: list[dict[str, Any] | None] = [
    None,
    {},
    {"retain": 0.0},
    {"start_layer": 2},
    {"start_layer": 0},
]


def merge_layers(
    settings: MiniCache, layers: list[Any], stored: Stored, first: int
) -> None:
    """Merge one prompt's tokens in two layers of a cache, in place.

    Args:
        settings: Of the method.
        layers: Two of a cache, ``[1, kv_heads, tokens, head_size]`` in each half.
        stored: What the cache makes of vectors.
        first: Number of the lower layer.
    """
    halves = [[getattr(layer, name) for layer in layers] for name in ("keys", "values")]
    found = [merge(half[0][0], half[1][0], settings.t) for half in halves]
    tokens = halves[0][0].shape[2]
    count = int(settings.retain * tokens)
    kept = select(strangeness(*(m.distance for m in found)), count)
    stays = torch.zeros(found[0].distance.shape, dtype=torch.bool)
    stays.scatter_(1, kept, True)
    for number, (half, merged) in enumerate(zip(halves, found, strict=True)):
        code = stored(merged.shared, first, number)
        read = (code, code * merged.ratio[..., None])
        for own, like in zip(half, read, strict=True):
            own[0] = torch.where(stays[..., None], own[0], like)


@torch.inference_mode()
def measure(
    model: Any, settings: dict[str, Any] | None, stored: Stored, args: Any
) -> tuple[float, float, float]:
    """Shares of right first and second answer tokens, and nats per answer token."""
    rng, right, lost = random.Random(1), torch.zeros(2), 0.0
    scorer = None if settings is None else MiniCache(**settings)
    layers = model.config.num_hidden_layers
    for _ in range(args.count):
        tokens, start = sequence(rng, args.length + 4 * QUESTIONS, args.facts)
        ids = torch.tensor([tokens])
        cache = model(ids[:, :start], use_cache=True).past_key_values
        for number, layer in enumerate(cache.layers):
            layer.keys = stored(layer.keys, number, 0)
            layer.values = stored(layer.values, number, 1)
        for pair in scorer.layer_pairs(layers) if scorer else []:
            own = [cache.layers[number] for number in pair]
            merge_layers(scorer, own, stored, pair[0])
        logits = model(ids[:, start:], past_key_values=cache).logits[0, :-1]
        wanted = ids[0, start + 1 :]
        asked = torch.arange(len(wanted)) % 4 > 0
        asked &= torch.arange(len(wanted)) % 4 < 3
        rated = logits.log_softmax(-1)[asked]
        right += (rated.argmax(-1) == wanted[asked]).view(-1, 2).sum(0)
        lost -= float(rated.gather(1, wanted[asked][:, None]).sum())
    count = args.count * QUESTIONS
    return *(right / count).tolist(), lost / count / 2


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=192)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--facts", type=int, default=8)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model)
    names = list(FORMATS)
    print("| settings |", " | ".join(names), "|")
    print("|---|" + "---|" * len(names))
    for settings in SETTINGS:
        shown = "not merged" if settings is None else str(settings or "the default")
        cells = []
        for name in names:
            first, second, nats = measure(model, settings, FORMATS[name], args)
            cells.append(f"{first:.1%}, {second:.1%}, {nats:.3f}")
        print(f"| {shown} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
