"""NVIDIA's kvpress beside us: the same model, prompts and budget, in one run.

    KVCOMPRESS_KVPRESS_PYTHON=... python scripts/compare_kvpress.py --json FILE

kvpress presses the cache of transformers' models, in an environment of its own (`make
compare-kvpress` makes one). Both sides answer the needle questions of the bundled
model, question inside the compressed prompt; first one prompt alone, then all at once:
a static batch there, continuous batching here. With ``--model tall`` and the like
weights are random and only time counts. The sides take turns, so that the machine's
moods meet both.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_kvcompress.tools.arms import Job, compressed_arm, run_arm
from vllm_kvcompress.tools.bench_model import OWN_SHAPES, bench_model
from vllm_kvcompress.tools.environment import environment
from vllm_kvcompress.tools.needle import NeedlePrompt, accuracy
from vllm_kvcompress.tools.needle_run import NeedleRun

SCRIPT = Path(__file__).with_name("kvpress_arms.py")
BLOCK = 32
WINDOW, KERNEL = 32, 7
SNAPKV = {"window_size": WINDOW, "kernel_size": KERNEL}
OURS_SNAPKV = {"window": WINDOW, "kernel_size": KERNEL, "pooling": "avg"}
PAIRS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "snapkv": (OURS_SNAPKV, "SnapKVPress", SNAPKV),
    "ada_snapkv": (OURS_SNAPKV, "AdaKVPress", {"press": "SnapKVPress"}),
    "pyramidkv": (OURS_SNAPKV, "PyramidKVPress", SNAPKV),
    "tova": ({}, "TOVAPress", {}),
    "keydiff": ({}, "KeyDiffPress", {}),
    "knorm": ({}, "KnormPress", {}),
    "streamingllm": ({"sinks": 4}, "StreamingLLMPress", {"n_sink": 4}),
    "random": ({}, "RandomPress", {}),
}
"""Our settings, and kvpress's class with its arguments."""
FULL = "full cache"
FIGURES = ("ttft_s", "decode_tokens_per_s", "throughput_tokens_per_s")


def press(method: str, ratio: float) -> list[Any]:
    """kvpress's counterpart that drops ``ratio`` of a prompt."""
    _, name, arguments = PAIRS[method]
    if "press" in arguments:
        inner = [arguments["press"], {**SNAPKV, "compression_ratio": ratio}]
        return [name, {"press": inner}]
    return [name, {**arguments, "compression_ratio": ratio}]


def kvpress_runs(python: str, job: dict[str, Any]) -> dict[str, Any]:
    """What kvpress's side writes; see its script."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "job.json"), Path(folder, "result.json")
        source.write_text(json.dumps(job))
        # -I: our own packages stay out of it.
        command = [python, "-I", str(SCRIPT), str(source), str(target)]
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        if done.returncode:
            sys.exit(f"kvpress failed: {done.stderr.decode()[-2000:]}")
        return json.loads(target.read_text())


def vllm_run(name: str, job: Job, arm: dict[str, Any]) -> dict[str, Any]:
    """The same figures of real vLLM: of the first prompt alone, and of all."""
    found = {}
    for label, prompts in (("alone", job.passes[0][:1]), ("batch", job.passes[0])):
        part = Job(job.llm, [prompts], job.warmup, job.max_tokens)
        done = run_arm(name, part, arm, report=lambda share: None)
        found[label] = {
            "outputs": done.outputs[0],
            **{key: done.measures[key] for key in FIGURES},
            "kv_bytes_per_request": done.measures["kv_bytes_held"]
            / done.measures["decode_requests"],
        }
    return found


def table(
    title: str, rows: dict[str, Any], prompts: list[NeedlePrompt] | None
) -> Table:
    """Both sides, a row per method and side."""
    made = Table(title=title, title_justify="left")
    heads = ("right", "KV MiB", "first token, s", "decode", "all at once")
    for head in ("method", "", *heads):
        made.add_column(head, justify="left" if head in ("method", "") else "right")
    for method, sides in rows.items():
        for side, run in sides.items():
            alone, batch = run["alone"], run["batch"]
            right = accuracy(prompts, batch["outputs"]) if prompts else None
            run["accuracy"] = right
            made.add_row(
                method,
                side,
                "-" if right is None else f"{right:.0%}",
                f"{batch['kv_bytes_per_request'] / 2**20:.2f}",
                f"{alone['ttft_s']:.3f}",
                f"{alone['decode_tokens_per_s']:,.0f}",
                f"{batch['throughput_tokens_per_s']:,.0f}",
            )
    return made


def main() -> None:
    """Run both sides and show them."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", default="needle", choices=["needle", *OWN_SHAPES])
    add("--methods", default=",".join(PAIRS))
    add("--prompt-len", type=int, default=4096)
    add("--prompts", type=int, default=16)
    add("--budget", type=int, default=256)
    add("--max-tokens", type=int, default=128)
    add("--json", type=Path)
    args = parser.parse_args()
    python = os.environ.get("KVCOMPRESS_KVPRESS_PYTHON")
    if not python:
        sys.exit("KVCOMPRESS_KVPRESS_PYTHON names no Python that has kvpress")
    methods = args.methods.split(",")
    run = NeedleRun.prepare(
        prompt_len=args.prompt_len,
        count=args.prompts,
        needles=8,
        max_tokens=args.max_tokens,
        block_size=BLOCK,
    )
    job, model, asked = run.job, run.model, run.prompts
    questions: list[NeedlePrompt] | None = asked
    if args.model != "needle":
        model, questions = bench_model(args.model), None
        space = (args.prompts + 2) * (args.prompt_len + args.max_tokens + 128)
        llm = {
            **job.llm,
            "model": model.location,
            "dtype": model.dtype,
            "kv_cache_memory_bytes": space * model.token_bytes,
        }
        job = Job(llm, job.passes, job.warmup, job.max_tokens)
    machine = environment()
    theirs_job = {
        "model": model.location,
        "prompts": [prompt.token_ids for prompt in asked],
        "warmup": list(job.warmup),
        "max_tokens": args.max_tokens,
    }
    if args.model != "needle":
        theirs_job["model"] = str(Path(model.location).resolve())
    ratio = 1 - args.budget / args.prompt_len
    rows: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    for method in (FULL, *methods):
        ours: dict[str, Any] = {}
        theirs = None
        if method != FULL:
            own = {"method": method, "budget": args.budget, **PAIRS[method][0]}
            ours, theirs = compressed_arm(own), press(method, ratio)
        pressed = kvpress_runs(python, {**theirs_job, "arms": {method: theirs}})
        versions = pressed["versions"]
        label = "transformers" if method == FULL else "kvpress"
        rows[method] = {
            label: pressed["arms"][method],
            "stock vLLM" if method == FULL else "vLLM, ours": vllm_run(
                method, job, ours
            ),
        }
        print(method, "done", file=sys.stderr)
    title = (
        f"{model.about['name']}: {args.prompts} prompts of {args.prompt_len:,} tokens, "
        f"{args.budget} kept, {args.max_tokens} generated"
    )
    Console(width=110).print(table(title, rows, questions))
    if args.json:
        for sides in rows.values():
            for figures in sides.values():
                del figures["alone"]["outputs"], figures["batch"]["outputs"]
        document = {
            "settings": {
                key: str(value) if isinstance(value, Path) else value
                for key, value in vars(args).items()
                if key != "json"
            },
            "environment": {**machine, "kvpress": versions},
            "methods": rows,
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
