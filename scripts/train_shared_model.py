"""Train, or go on training, a model that shares KV, on needle questions; on a CPU.

    python scripts/train_shared_model.py cla --output tests/models/cla
    python scripts/train_shared_model.py FOLDER --output build/better

The first makes one of the models that the tests use (see ``needle_start.py``), the
second takes any folder of a model of ours, or of an ordinary Llama, whose vocabulary is
the bundled model's. ``kvcompress convert`` makes such folders.

A sequence is filler with facts among it, as in ``vllm_kvcompress/tools/needle.py``,
and ends with a question about each fact. What is told at the end is measured with the
tool's own prompts, which ask once.
"""

import argparse
import json
import random
import shutil
from pathlib import Path

import torch
from needle_start import BY_TYPE, NEW, new_model
from training import Batch, fit
from transformers import PreTrainedModel

from vllm_kvcompress.tools import needle

ANSWER = 3  # two words and the full stop
QUESTION = 2 + ANSWER
STAGES = "128x16x150,512x4x150,1024x3x150"
TOKENIZER = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


def sequence(rng: random.Random, sentences: int, facts: int) -> list[int]:
    """``1 + 8 * sentences + 10 * facts`` tokens."""
    keys = rng.sample(needle.KEYS, facts)
    values = rng.sample(needle.VALUES, 2 * facts)
    told = [[key, *values[2 * i : 2 * i + 2]] for i, key in enumerate(keys)]
    parts = [needle._sentence(rng) for _ in range(sentences)]
    for fact in told:
        place = rng.randint(0, len(parts))
        parts.insert(place, [needle.REMEMBER, *fact, needle.STOP])
    for fact in rng.sample(told, facts):
        parts.append([needle.RECALL, *fact, needle.STOP])
    ids = needle._vocabulary()
    return [ids[word] for word in (needle.BOS, *(w for part in parts for w in part))]


def draw(rng: random.Random, size: int, longest: int) -> Batch:
    """A batch for `training.fit`."""
    length = rng.randint(longest // 2, longest)
    facts = rng.randint(2, min(16, (length - 1) // 12))
    asked = QUESTION * facts
    sentences = (length - 1 - 2 * asked) // 8
    tokens = torch.tensor([sequence(rng, sentences, facts) for _ in range(size)])
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, -asked:] = torch.arange(asked) % QUESTION >= QUESTION - ANSWER
    return tokens, mask


def load(folder: str) -> PreTrainedModel:
    """The model in a folder, in float32."""
    kind = json.loads((Path(folder) / "config.json").read_text())["model_type"]
    return BY_TYPE[kind].from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def measure(model: PreTrainedModel, tokens: int, count: int, seed: int = 1) -> float:
    """Share of needle prompts answered right, both words, greedily."""
    prompts = needle.needle_prompts(num_tokens=tokens, count=count, seed=seed)
    outputs: list[list[int]] = []
    for first in range(0, count, 8):
        some = prompts[first : first + 8]
        ids = torch.tensor([prompt.token_ids for prompt in some])
        for _ in range(2):
            best = model(ids).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, best], dim=1)
        outputs += ids[:, tokens:].tolist()
    return needle.accuracy(prompts, outputs)


def main() -> None:
    """Read the flags, train, measure what was written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("start", help=f"{', '.join(NEW)}, or the folder of a model")
    parser.add_argument("--output", required=True)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument(
        "--stages",
        default=STAGES,
        help="LENGTHxBATCHxSTEPS, one after the other (default %(default)s)",
    )
    parser.add_argument("--prompts", type=int, default=200, help="to measure with")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = new_model(args.start) if args.start in NEW else load(args.start)
    seconds = fit(model.train(), draw, args.stages, args.rate)
    model.to(torch.bfloat16).save_pretrained(args.output)
    for name in TOKENIZER:
        shutil.copy(Path(needle.model_path()) / name, args.output)
    written = load(args.output).eval()
    told = {
        "command": f"python scripts/train_shared_model.py {args.start} "
        f"--rate {args.rate} --stages {args.stages}",
        "seconds": round(seconds),
        "prompts": args.prompts,
        "answered": {n: measure(written, n, args.prompts) for n in (512, 1024)},
    }
    print(told)
    file = Path(args.output) / "training.json"
    file.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
