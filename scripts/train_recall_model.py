"""Train a small Llama of several layers to recall facts; deterministic, on a CPU.

    python scripts/train_recall_model.py --output build/recall-model

A sequence is filler with facts ``remember KEY VALUE VALUE`` among it, and ends with
questions ``recall KEY`` and their answers. Unlike the bundled needle model, whose
weights are set by hand for two layers, this one spreads its work over layers as
training has it, which is what methods that merge layers need to be judged by.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from training import fit
from transformers import LlamaConfig, LlamaForCausalLM

BOS, REMEMBER, RECALL = 0, 1, 2
KEYS = range(16, 80)
VALUES = range(80, 208)
FILLER = range(208, 256)
VOCAB = 256
QUESTIONS = 8


def sequence(rng: random.Random, length: int, facts: int) -> tuple[list[int], int]:
    """A sequence of ``length`` tokens, and where its questions begin."""
    keys = rng.sample(KEYS, facts)
    known = {key: [rng.choice(VALUES), rng.choice(VALUES)] for key in keys}
    asked = [rng.choice(keys) for _ in range(QUESTIONS)]
    questions = [token for key in asked for token in (RECALL, key, *known[key])]
    room = length - 1 - len(questions)
    spare = room - 4 * facts
    places = sorted(rng.randint(0, spare) for _ in keys)
    text, done = [BOS], 0
    for key, place in zip(keys, places, strict=True):
        text += rng.choices(FILLER, k=place - done)
        text += [REMEMBER, key, *known[key]]
        done = place
    text += rng.choices(FILLER, k=spare - done)
    return text + questions, len(text)


def batch(rng: random.Random, size: int, length: int, facts: int) -> torch.Tensor:
    """``[size, length]`` int64."""
    return torch.tensor([sequence(rng, length, facts)[0] for _ in range(size)])


def answers(tokens: torch.Tensor) -> torch.Tensor:
    """Mask of the two answer tokens of each question, ``[size, length]``."""
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    start = tokens.shape[1] - 4 * QUESTIONS
    mask[:, start + 2 :: 4] = mask[:, start + 3 :: 4] = True
    return mask


def _new(args: argparse.Namespace) -> LlamaForCausalLM:
    """A model with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=args.hidden,
            intermediate_size=2 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=8192,
            rope_theta=1e6,
            tie_word_embeddings=False,
        )
    )


def draw(
    rng: random.Random, size: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch for `training.fit`."""
    own = rng.randint(length // 2, length)
    most = max(2, min(24, (own - 4 * QUESTIONS) // 8))
    tokens = batch(rng, size, own, rng.randint(2, most))
    return tokens, answers(tokens)


def train(args: argparse.Namespace) -> None:
    """Train and save."""
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(args.resume) if args.resume else _new(args)
    fit(model, draw, args.stages, args.rate)
    model.save_pretrained(args.output)
    (Path(args.output) / "training.json").write_text(json.dumps(vars(args)))


def main() -> None:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    parser.add_argument("--resume", help="go on with this model")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument(
        "--stages",
        default="96x64x900,256x32x300,512x16x200",
        help="LENGTHxBATCHxSTEPS, one after the other (default %(default)s)",
    )
    train(parser.parse_args())


if __name__ == "__main__":
    main()
