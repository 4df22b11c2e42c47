"""kvpress's side of `compare_kvpress.py`; it runs where kvpress is installed.

    python kvpress_arms.py JOB.json RESULT.json

JOB holds ``model`` (a folder), ``prompts`` and ``warmup`` (token ids, all of a length),
``max_tokens`` and ``arms``: name -> null for the full cache, or a press's class with
its arguments, of which ``press`` may again be one. RESULT holds for each arm what it
answered and its figures, first of one prompt alone, then of all prompts as one batch.
"""

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import kvpress
import torch
from transformers import AutoModelForCausalLM


def make_press(spec: Any) -> Any:
    """The press that ``[class, arguments]`` names; no press for None."""
    if spec is None:
        return contextlib.nullcontext
    name, arguments = spec
    made = {
        key: make_press(value) if key == "press" else value
        for key, value in arguments.items()
    }
    return getattr(kvpress, name)(**made)


def generate(model: Any, press: Any, ids: torch.Tensor, count: int) -> Any:
    """Greedy tokens, seconds, and the cache that is left."""
    context = press(model) if isinstance(press, kvpress.BasePress) else press()
    start = time.perf_counter()
    with torch.inference_mode(), context:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            return_dict_in_generate=True,
        )
    seconds = time.perf_counter() - start
    return out.sequences[:, ids.shape[1] :], seconds, out.past_key_values


def cache_bytes(cache: Any) -> int:
    """What keys and values take."""
    tensors = [
        tensor for layer in cache.layers for tensor in (layer.keys, layer.values)
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(model: Any, press: Any, ids: torch.Tensor, count: int) -> dict[str, Any]:
    """One batch's answers and figures."""
    _, first, cache = generate(model, press, ids, 1)
    tokens, whole, _ = generate(model, press, ids, count)
    return {
        "outputs": tokens.tolist(),
        "ttft_s": first,
        "decode_tokens_per_s": len(ids) * (count - 1) / (whole - first),
        "throughput_tokens_per_s": len(ids) * count / whole,
        "kv_bytes_per_request": cache_bytes(cache) / len(ids),
    }


def main() -> None:
    """Run every arm."""
    job = json.loads(Path(sys.argv[1]).read_text())
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto").eval()
    model.generation_config.eos_token_id = None
    prompts, warmup = torch.tensor(job["prompts"]), torch.tensor(job["warmup"])
    done: dict[str, Any] = {}
    for name, spec in job["arms"].items():
        press = make_press(spec)
        generate(model, press, warmup, 2)
        done[name] = {
            "alone": measure(model, press, prompts[:1], job["max_tokens"]),
            "batch": measure(model, press, prompts, job["max_tokens"]),
        }
        print(name, "done", flush=True)
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    Path(sys.argv[2]).write_text(json.dumps({"arms": done, "versions": versions}))


if __name__ == "__main__":
    main()
