"""What the plugin costs while nobody asks for it: stock vLLM with and without it.

    python scripts/measure_off.py --pairs 5 --json FILE

Engines start in turn, with the plugin installed and no flag given, and with vLLM told
to load no plugins at all. Same model, same prompts; a process each.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from vllm_kvcompress.tools.environment import environment
from vllm_kvcompress.tools.needle import model_path, needle_prompts

ARMS: dict[str, dict[str, str]] = {"installed": {}, "absent": {"VLLM_PLUGINS": ""}}
FIGURES = ("start_s", "tokens_per_s")


def serve(requests: int, prompt_len: int) -> dict[str, Any]:
    """Start an engine in this process and serve; what it took."""
    prompts = needle_prompts(num_tokens=prompt_len, needles=8, count=requests, seed=0)
    start = time.perf_counter()
    from vllm import LLM, SamplingParams

    llm = LLM(
        model_path(),
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=prompt_len + 128,
        kv_cache_memory_bytes=2**29,
    )
    started = time.perf_counter()
    params = SamplingParams(
        max_tokens=128, temperature=0.0, ignore_eos=True, detokenize=False
    )
    given = [{"prompt_token_ids": prompt.token_ids} for prompt in prompts]
    llm.generate(given[:1], params, use_tqdm=False)
    llm.reset_prefix_cache()
    begin = time.perf_counter()
    outputs = llm.generate(given, params, use_tqdm=False)
    seconds = time.perf_counter() - begin
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return {
        "start_s": started - start,
        "tokens_per_s": sum(map(len, tokens)) / seconds,
        "tokens": hashlib.sha256(json.dumps(tokens).encode()).hexdigest(),
    }


def run(arm: str, args: argparse.Namespace) -> dict[str, Any]:
    """`serve` in a process of its own."""
    command = [sys.executable, __file__, "--requests", str(args.requests)]
    command += ["--prompt-len", str(args.prompt_len), "--serve"]
    done = subprocess.run(
        command,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", **ARMS[arm]},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run the pairs and show their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt-len", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        print(json.dumps(serve(args.requests, args.prompt_len)))
        return
    machine = environment()
    pairs = []
    for number in range(args.pairs):
        order = list(ARMS)[:: 1 if number % 2 else -1]  # neither is always first
        pairs.append({arm: run(arm, args) for arm in order})
        print(json.dumps(pairs[-1]), file=sys.stderr)
    for key in FIGURES:
        ratios = [pair["installed"][key] / pair["absent"][key] for pair in pairs]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"{key}: installed is {median(ratios):.3f} of absent ({spread})")
    hashes = {run["tokens"] for pair in pairs for run in pair.values()}
    print("tokens:", "the same in all runs" if len(hashes) == 1 else "DIFFER")
    if args.json:
        document = {"environment": machine, "pairs": pairs}
        args.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
