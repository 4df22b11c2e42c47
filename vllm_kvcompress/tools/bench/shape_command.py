"""`kvcompress bench shapes`: a method against stock vLLM, engine step by step."""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...models import METHODS as SHARING
from ..arguments import gibibytes, json_object, positive
from ..bench_model import BenchModel, bench_model, sharing_model
from ..errors import ToolError
from ..trace import Measures, medians
from .comparison import Comparison, comparison
from .settings import DEFAULT_BUDGET, method_settings
from .shapes import (
    EVICTION_SHAPES,
    SHAPES,
    SHARING_SHAPES,
    Traffic,
    kv_space_bytes,
    limit,
)

SHORT = 256  # prompts that all methods leave alone
DEFAULT_TARGETS = {"cla": "cla2", "lckv": "lckv-w2", "yoco": "yoco"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add = parser.add_argument
    add("--method", required=True, help="the method to measure, such as snapkv")
    add(
        "--model",
        default="small",
        help="a checkpoint, or a random-weight Llama of ours: small (default, GQA, "
        "2 layers), wide (8 layers with 16 KV heads, bound by its weights), tall (22 "
        "layers with 4 KV heads in bfloat16, half of TinyLlama's width) or deep (40 "
        "layers with 8 KV heads, a narrow Llama-2-13B)",
    )
    add(
        "--prompt-len",
        type=positive,
        default=16384,
        help="tokens of a long prompt (default %(default)s)",
    )
    add("--budget", type=positive, help=f"tokens kept (default {DEFAULT_BUDGET})")
    add(
        "--to",
        help="with --method cla, lckv or yoco: what the model is converted to, as in "
        "kvcompress convert (default: cla2, lckv-w2, yoco)",
    )
    add("--config", default="{}", help="more settings of the method, as JSON")
    add(
        "--engine",
        type=json_object,
        default={},
        help="keywords of LLM for all arms, as JSON, such as '{\"block_size\": 32}'",
    )
    add(
        "--shapes",
        help=f"which of {', '.join(SHAPES)} (default: {', '.join(EVICTION_SHAPES)}; "
        f"of models that share KV {', '.join(SHARING_SHAPES)})",
    )
    add("--requests", type=positive, help="requests (default: each shape's own)")
    add("--max-tokens", type=positive, help="output tokens (default: the shape's)")
    add(
        "--fp8",
        action="store_true",
        help="measure stock vLLM with an fp8 KV cache beside them",
    )
    add(
        "--kv-space", type=gibibytes, help="GiB for the KV cache (default: the shape's)"
    )
    add(
        "--repeats",
        type=positive,
        default=1,
        help="rounds of all arms, of which the medians count (default %(default)s)",
    )
    add("--json", type=Path, help="file to write the figures to")
    add("--verbose", action="store_true", help="show vLLM's own output")


def kept_tokens(settings: Mapping[str, Any], prompt_len: int, layers: int) -> int:
    """How many tokens of a long prompt stay, in the mean of all layers.

    Raises:
        ToolError: All of them; there would be nothing to measure.
    """
    from ...config import ConfigError, KVCompressionConfig

    config = KVCompressionConfig.from_dict(settings)
    try:
        tiers = config.tiers(layers)
    except ConfigError as error:
        raise ToolError(str(error)) from None
    fits = config.tier_fits(config.method, tiers, prompt_len, 1)
    kept = sum(fits[tier].own_blocks * len(tier) for tier in tiers) // layers
    if kept >= prompt_len:
        raise ToolError(
            f"--prompt-len {prompt_len} must be above the {kept} tokens that are kept"
        )
    return kept


def shape_names(text: str) -> list[str]:
    """Split and check ``--shapes``.

    Raises:
        ToolError: An unknown name.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in SHAPES:
            known = ", ".join(SHAPES)
            raise ToolError(f"unknown shape {name!r}; allowed values: {known}")
    return names


@dataclass
class _Bench:
    """The runs of one call, and what they ran with."""

    args: argparse.Namespace
    compressed: dict[str, Any]
    model: BenchModel
    kept: int
    add_task: Callable[[str], Callable[[float], None]]
    parameters: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run_shape(self, name: str) -> Comparison:
        """Measure all arms of one shape, in turn, as often as asked."""
        args = self.args
        sizes = (args.prompt_len, self.kept, args.requests, args.max_tokens)
        traffic = SHAPES[name](*sizes)
        arms = {"stock": traffic, "compressed": traffic}
        if args.fp8:
            arms["fp8"] = traffic
        if name == "long_decode" and args.method not in SHARING:
            arms["limit"] = limit(*sizes)
        space = kv_space_bytes(traffic, self.model.token_bytes)
        if args.kv_space:
            space = args.kv_space
        self.parameters[name] = {**asdict(traffic), "kv_space_bytes": space}
        runs: dict[str, list[Measures]] = {arm: [] for arm in arms}
        for _ in range(args.repeats):
            for arm, sent in arms.items():
                runs[arm].append(self._run_arm(name, arm, sent, space))
        return comparison({arm: medians(each) for arm, each in runs.items()})

    def _run_arm(self, shape: str, arm: str, traffic: Traffic, space: int) -> Measures:
        from ..arms import Job, run_arm

        model = self.model
        job = Job(
            llm={
                "model": model.location,
                "dtype": model.dtype,
                "skip_tokenizer_init": True,
                "max_model_len": traffic.prompt_len + traffic.max_tokens,
                "kv_cache_memory_bytes": space,
                **self.args.engine,
            },
            passes=traffic.prompts(model.vocab_size),
            warmup=traffic.warmup(model.vocab_size, self.kept),
            max_tokens=traffic.max_tokens,
        )
        label = f"{shape} · {arm}"
        result = run_arm(
            label,
            job,
            {
                "compressed": self.compressed,
                "fp8": {"kv_cache_dtype": "fp8"},
            }.get(arm, {}),
            report=self.add_task(label),
            verbose=self.args.verbose,
        )
        self.engine[arm] = result.engine
        return result.measures


def _eviction_settings(args: argparse.Namespace) -> dict[str, Any]:
    if args.to:
        raise ToolError(f"--to means nothing with --method {args.method}")
    return method_settings(args.method, args.budget, args.config)


def _sharing_settings(args: argparse.Namespace) -> dict[str, Any]:
    if args.budget or args.config != "{}":
        raise ToolError(
            f"--method {args.method} is how a model is built and has no settings; "
            "drop --budget and --config"
        )
    return {"method": args.method}


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    sharing = args.method in SHARING
    shapes = SHARING_SHAPES if sharing else EVICTION_SHAPES
    names = shape_names(args.shapes or ",".join(shapes))
    method = _sharing_settings(args) if sharing else _eviction_settings(args)
    from ..arms import compressed_arm
    from ..environment import environment, warn_if_busy
    from ..progress import progress_bars, task_adder
    from .report import show

    model = bench_model(args.model)
    compressed = compressed_arm(method)
    if sharing:
        to = args.to or DEFAULT_TARGETS[args.method]
        compressed["model"] = sharing_model(model, to, args.method)
        model.about["converted_to"] = to
        kept = min(args.prompt_len, SHORT)  # nothing is dropped
    else:
        kept = kept_tokens(method, args.prompt_len, model.about["layers"])
    machine = environment()
    warn_if_busy(machine)
    with progress_bars() as bars:
        bench = _Bench(args, compressed, model, kept, task_adder(bars))
        measured = {name: bench.run_shape(name) for name in names}
    show(measured)
    if sharing:
        per_token = {arm: own["token_bytes"] for arm, own in bench.engine.items()}
        model.about["kv_bytes_per_token"] = per_token
        print(
            "KV bytes per token:", ", ".join(f"{a} {n}" for a, n in per_token.items())
        )
    if args.json:
        document = {
            "method": args.method,
            "settings": {
                "method": method,
                "model": model.about,
                "engine": args.engine,
                "repeats": args.repeats,
                "shapes": bench.parameters,
            },
            "environment": {**machine, **bench.engine["stock"]},
            "shapes": measured,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0
