"""What MiniCache costs a trained model of several layers: accuracy against memory.

    python scripts/train_recall_model.py --output build/recall-model
    python scripts/measure_minicache.py build/recall-model

A prompt is the text with the facts. Questions and right answers are forced on what is
generated, so that every arm reads the same tokens, and all of the text through its
cache; graded are the log-probabilities that the model had for each answer.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from typing import Any

import torch
from train_recall_model import QUESTIONS, sequence
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

FORCED = "forced"
ARMS: list[dict[str, Any]] = [
    {},
    {"retain": 0.0},
    {"retain": 0.05},
    {"retain": 0.05, "retention": "range"},
    {"retain": 0.2},
    {"retain": 0.2, "retention": "range"},
    {"t": 0.0},
    {"t": 0.5},
    {"t": 1.0},
    {"start_layer": 6},
    {"start_layer": 2},
    {"start_layer": 0},
    {"method": "snapkv", "budget": 288},
    {"over": "snapkv", "budget": 288},
]
BLOCK = 32


class Forced(AdapterLogitsProcessor):
    """Leaves a request no choice but the tokens that it names."""

    def is_argmax_invariant(self) -> bool:
        """See `LogitsProcessor`."""
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        """See `AdapterLogitsProcessor`."""
        wanted = params.extra_args[FORCED]

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            only = torch.full_like(logits, float("-inf"))
            only[wanted[len(output_ids)]] = 0.0
            return only

        return force


def run(model: str, arm: dict[str, Any], args: argparse.Namespace) -> dict[str, float]:
    """One arm, in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    import vllm_kvcompress

    llm = {"dtype": "float32", "block_size": BLOCK, **args.llm}
    if arm:
        settings = {"method": "minicache", **arm}
        llm["additional_config"] = {"kv_compression": settings}
    engine = LLM(
        model,
        skip_tokenizer_init=True,
        max_model_len=args.length + 64,
        kv_cache_memory_bytes=1 << 28,
        logits_processors=[Forced],
        **llm,
    )
    rng = random.Random(1)
    prompts, params = [], []
    for _ in range(args.count):
        tokens, start = sequence(rng, args.length + 4 * QUESTIONS, args.facts)
        prompts.append({"prompt_token_ids": tokens[:start]})
        params.append(
            SamplingParams(
                temperature=0,
                max_tokens=4 * QUESTIONS,
                detokenize=False,
                ignore_eos=True,
                logprobs=1,
                extra_args={FORCED: tokens[start:]},
            )
        )
    right, lost = [0, 0], 0.0
    for output in engine.generate(prompts, params, use_tqdm=False):
        rows = output.outputs[0].logprobs
        for place, token in enumerate(output.outputs[0].token_ids):
            if place % 4 > 1:
                right[place % 4 - 2] += rows[place][token].rank == 1
                lost -= rows[place][token].logprob
    count = args.count * QUESTIONS
    core = engine.llm_engine.engine_core.engine_core
    groups = len(core.scheduler.kv_cache_config.kv_cache_groups)
    size = engine.llm_engine.vllm_config.cache_config.block_size
    blocks = groups * -(-args.length // size)
    freed = vllm_kvcompress.stats(engine)["blocks_freed"] / args.count if arm else 0
    return {
        "first": right[0] / count,
        "second": right[1] / count,
        "nats": lost / count / 2,
        "kept": 1 - freed / blocks,
    }


def main() -> None:
    """Run every arm in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--facts", type=int, default=8)
    parser.add_argument("--llm", type=json.loads, default={}, help="keywords of LLM")
    parser.add_argument("--arm", type=json.loads, help="run this one only")
    args = parser.parse_args()
    if args.arm is not None:
        print("RESULT", json.dumps(run(args.model, args.arm, args)))
        return
    print("| settings | KV blocks | first token | second token | nats per token |")
    print("|---|---|---|---|---|")
    for arm in ARMS:
        done = subprocess.run(
            [sys.executable, *sys.argv, "--arm", json.dumps(arm)],
            capture_output=True,
            text=True,
            check=False,
        )
        lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT")]
        shown = ", ".join(f"{k}={v}" for k, v in arm.items()) or "stock"
        if not lines:
            print(f"| {shown} | failed: {done.stderr.splitlines()[-1]} |")
            continue
        found = json.loads(lines[0].removeprefix("RESULT "))
        print(
            f"| {shown} | {found['kept']:.1%} | {found['first']:.1%} "
            f"| {found['second']:.1%} | {found['nats']:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
