"""Result folders as `kvcompress eval` and `kvcompress bench` write them, made up."""

import json
from pathlib import Path
from typing import Any

TASKS = ("niah_single", "niah_multikey", "qa")
LENGTHS = (2048, 4096, 8192)
DEPTHS = (0.0, 0.5, 1.0)
SKILL = {"stock": 1.0, "snapkv": 0.9, "knorm": 0.6, "random": 0.15}
ENVIRONMENT = {"vllm": "0.32.0", "cpu": "a CPU", "cores": 2, "accelerator": None}


def write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value))


def write_lines(file: Path, values: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(value) + "\n" for value in values))


def config(method: str, budget: int | None, **changes: Any) -> dict[str, Any]:
    stock = method == "stock"
    return {
        "schema": 1,
        "model": "org/model",
        "arm": method,
        "label": method if stock else f"{method} budget={budget}",
        "settings": None if stock else {"method": method, "budget": budget},
        "budget": budget,
        "keep_ratio": None,
        "question": "inside",
        "target": "vllm",
        "tasks": list(TASKS),
        "lengths": list(LENGTHS),
        "depths": list(DEPTHS),
        "samples": 2,
        "seed": 0,
        "engine": {"block_size": 32},
        "group": "abcd1234",
        **changes,
    }


def predictions(method: str, share: float) -> list[dict[str, Any]]:
    """Two answers per cell; fewer are right the less is kept."""
    found = []
    right = 1.0 if method == "stock" else SKILL[method] * min(1, 0.5 + 1.5 * share)
    for task in TASKS:
        for length in LENGTHS:
            for depth in DEPTHS if task != "qa" else [None]:
                for sample in range(2):
                    place = len(found) * 37 % 100 / 100
                    score = float(place < right)
                    near = {"agreement": right, "kl": 1 - right + 0.01, "tokens": 8}
                    found.append(
                        {
                            "task": task,
                            "length": length,
                            "depth": depth,
                            "sample": sample,
                            "prompt_tokens": length - 3,
                            "answers": ["7481"],
                            "output": "7481" if score else "I do not know.",
                            "score": score,
                            "finish_reason": "stop",
                            "fidelity": None if method == "stock" else near,
                        }
                    )
    return found


def mean(lines: list[dict[str, Any]]) -> dict[str, Any]:
    total = sum(line["score"] for line in lines)
    return {"accuracy": total / len(lines), "samples": len(lines)}


def metrics(lines: list[dict[str, Any]], share: float) -> dict[str, Any]:
    keys = dict.fromkeys((p["task"], p["length"], p["depth"]) for p in lines)
    near = [line["fidelity"] for line in lines if line["fidelity"]]
    return {
        "complete": True,
        **mean(lines),
        "by_task": {t: mean([p for p in lines if p["task"] == t]) for t in TASKS},
        "cells": [
            {
                **{"task": task, "length": length, "depth": depth},
                **mean(
                    [
                        p
                        for p in lines
                        if (p["task"], p["length"], p["depth"]) == (task, length, depth)
                    ]
                ),
            }
            for task, length, depth in keys
        ],
        "fidelity": near[0] if near else None,
        "kv": {
            "kept_share": share,
            "compressions": 0 if share == 1 else len(lines),
            "tokens_evicted": int(1e6 * (1 - share)),
            "blocks_freed": int(3e4 * (1 - share)),
        },
        "seconds": 12.5,
    }


def write_arm(
    parent: Path, method: str, budget: int | None = None, **changes: Any
) -> Path:
    """An arm's folder, whole."""
    folder = parent / f"needle-{method}-budget={budget}-1a2b3c4d"
    folder.mkdir(parents=True)
    share = 1.0 if budget is None else budget / 4096
    lines = predictions(method, share)
    write(folder / "config.json", config(method, budget, **changes))
    write(folder / "environment.json", ENVIRONMENT)
    write_lines(folder / "predictions.jsonl", lines)
    write(folder / "metrics.json", metrics(lines, share))
    return folder


def write_group(parent: Path, budgets: tuple[int, ...] = (128, 512, 2048)) -> Path:
    """Stock, and three methods at these budgets."""
    write_arm(parent, "stock")
    for method in ("snapkv", "knorm", "random"):
        for budget in budgets:
            write_arm(parent, method, budget)
    return parent


def run(arm: str, method: str | None, **changes: Any) -> dict[str, Any]:
    """A line of runs.jsonl, of vLLM's keys and those counted beside them."""
    return {
        "kind": "serve",
        "arm": arm,
        "method": method,
        "model_id": "org/model",
        "dataset": "random",
        "input_len": 4096,
        "output_len": 128,
        "max_concurrency": 1,
        "request_rate": "inf",
        "output_throughput": 100.0,
        "median_ttft_ms": 80.0,
        "p99_ttft_ms": 200.0,
        "median_tpot_ms": 10.0,
        "p99_tpot_ms": 14.0,
        "completed": 64,
        "preemptions": 0.0,
        "kv_usage_peak": 0.5,
        "running_peak": 1.0,
        "failed": 0,
        **changes,
    }


ARMS = (
    ("stock", None, 8),
    ("stock fp8", None, 16),
    ("snapkv budget=512", "snapkv", 48),
    ("knorm budget=512", "knorm", 48),
)


def runs() -> list[dict[str, Any]]:
    """Arms over concurrency at two lengths; above `room` requests are preempted."""
    found = []
    for arm, method, room in ARMS:
        for length in (4096, 16384):
            fit = room * 4096 // length
            for at_once in (1, 4, 16, 64):
                running = min(at_once, fit)
                slow = (1.0 if method is None else 1.1) * length / 4096
                found.append(
                    run(
                        arm,
                        method,
                        input_len=length,
                        max_concurrency=at_once,
                        output_throughput=100 * running**0.8 / slow,
                        median_ttft_ms=80 * slow * max(1, at_once / running),
                        p99_ttft_ms=200 * slow * max(1, at_once / running),
                        median_tpot_ms=10 * slow * running**0.2,
                        p99_tpot_ms=14 * slow * running**0.2,
                        preemptions=float(max(0, at_once - fit)),
                        kv_usage_peak=min(1.0, at_once / fit),
                        running_peak=float(running),
                    )
                )
    return found


def write_bench(parent: Path, lines: list[dict[str, Any]] | None = None) -> Path:
    """A folder of a benchmark per prompt length."""
    lengths: dict[int, list[dict[str, Any]]] = {}
    for line in runs() if lines is None else lines:
        lengths.setdefault(line["input_len"], []).append(line)
    for length, own in lengths.items():
        folder = parent / f"serve-random-{length}+128-5e6f7a8b"
        folder.mkdir(parents=True)
        traffic = {"dataset_name": "random", "random_input_len": length}
        values = {
            "schema": 1,
            "kind": "serve",
            "model": "org/model",
            "engine": {"dtype": "bfloat16", "max_model_len": length + 144},
            "traffic": traffic,
            "num_prompts": 64,
            "seed": 0,
        }
        write(folder / "config.json", values)
        write(folder / "environment.json", ENVIRONMENT)
        write_lines(folder / "runs.jsonl", own)
    return parent
