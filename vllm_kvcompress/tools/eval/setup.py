"""From the command line to questions, arms, and who answers."""

import argparse
from typing import Any

from ..arguments import method_list
from ..bench_model import bench_model
from ..environment import environment
from ..errors import ToolError
from ..needle import model_path
from .conversation import Rules
from .engine import PROCESSOR, Engine
from .plan import BUDGETS, BUNDLED_OWN_SETTINGS, OWN_SETTINGS, Plan, plan, sizes
from .questions import Item, make_items
from .runner import Runner
from .server import Connection, Server

BUNDLED = "bundled needle model"
BLOCK_SIZE = 32  # of the bundled model's engines


def prepare(args: argparse.Namespace, tasks: list[str]) -> tuple[Runner, Plan]:
    """Make all that is needed before the first arm runs.

    Raises:
        ToolError: Something of it is impossible.
    """
    if args.url:
        return _on_server(args, tasks)
    if args.stock_url:
        raise ToolError("--stock-url needs --url, the server that compresses")
    return _on_engines(args, tasks)


def plan_engines(args: argparse.Namespace, block_size: int | None) -> Plan:
    """The arms of engines of our own."""
    default = None if args.keep_ratios else BUDGETS
    return plan(
        method_list(args.methods),
        sizes(args.budgets or default, args.keep_ratios),
        block_size=block_size,
        common=args.config,
        own=OWN_SETTINGS if args.model else BUNDLED_OWN_SETTINGS,
    )


def _on_engines(args: argparse.Namespace, tasks: list[str]) -> tuple[Runner, Plan]:
    location = args.model or model_path()
    tokenizer = _tokenizer(location)
    items = _items(args, tasks, tokenizer)
    keywords = _keywords(args, items)
    planned = plan_engines(args, keywords.get("block_size"))
    llm = {"model": location, **keywords}
    if args.question == "outside" or args.fidelity_tokens:
        others = keywords.get("logits_processors", [])
        llm["logits_processors"] = [*others, PROCESSOR]
    common = _common(args, tasks, args.model or BUNDLED, "vllm", keywords)
    runner = Runner(
        root=args.out,
        common={**common, "fidelity": "forced" if args.fidelity_tokens else None},
        environment=environment(),
        items=items,
        target=Engine(llm, args.batch),
        rules=Rules(args.fidelity_tokens, True, _stop_tokens(location, tokenizer)),
        tokenizer=tokenizer,
    )
    return runner, planned


def _on_server(args: argparse.Namespace, tasks: list[str]) -> tuple[Runner, Plan]:
    for flag in ("keep_ratios", "config", "engine"):
        if getattr(args, flag):
            name = flag.replace("_", "-")
            raise ToolError(f"--{name} says how an engine is started; not with --url")
    compressed = Connection(args.url)
    stock = Connection(args.stock_url) if args.stock_url else compressed
    target = Server(compressed, stock, args.batch)
    settings = target.settings()
    fixed = settings.get("budget", "")
    budgets = args.budgets or ([int(fixed)] if fixed.isdecimal() else None)
    planned = plan(
        method_list(args.methods or settings.get("method", "")),
        sizes(budgets, None),
        own={},
    )
    location = args.model or compressed.root
    try:
        tokenizer = _tokenizer(location)
    except ToolError as error:
        raise ToolError(f"{error}; give --model, which has the tokenizer") from None
    items = _items(args, tasks, tokenizer)
    outside = args.question == "outside"
    forces = False
    if outside or args.fidelity_tokens:
        forces = target.forces(items[0].asked.prompt, needed=outside)
    engine = {"url": compressed.url, "stock_url": stock.url, "server": settings}
    common = _common(args, tasks, compressed.root, "url", engine)
    followed = "forced" if forces else "prefix"
    runner = Runner(
        root=args.out,
        common={**common, "fidelity": followed if args.fidelity_tokens else None},
        environment={**environment(), "server_vllm": compressed.version()},
        items=items,
        target=target,
        rules=Rules(args.fidelity_tokens, forces, _stop_tokens(location, tokenizer)),
        tokenizer=tokenizer,
    )
    return runner, planned


def _common(
    args: argparse.Namespace,
    tasks: list[str],
    model: str,
    target: str,
    engine: dict[str, Any],
) -> dict[str, Any]:
    """What all arms that answer the same questions share."""
    return {
        "model": model,
        "question": args.question,
        "target": target,
        "tasks": tasks,
        "lengths": args.lengths,
        "depths": args.depths,
        "samples": args.samples,
        "seed": args.seed,
        "fidelity_tokens": args.fidelity_tokens,
        "engine": engine,
    }


def _items(args: argparse.Namespace, tasks: list[str], tokenizer: Any) -> list[Item]:
    return make_items(
        tokenizer,
        tasks,
        lengths=args.lengths,
        depths=args.depths,
        samples=args.samples,
        seed=args.seed,
        outside=args.question == "outside",
    )


def _keywords(args: argparse.Namespace, items: list[Item]) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM` but for the model; the user's win."""
    longest = max(
        len(item.asked.prompt) + len(item.asked.question) + item.asked.max_tokens
        for item in items
    )
    chosen: dict[str, Any] = {"max_model_len": longest, "max_num_seqs": args.batch}
    if not args.model:
        model = bench_model(model_path())
        room = longest + 4 * BLOCK_SIZE
        chosen |= {
            "dtype": model.dtype,
            "block_size": BLOCK_SIZE,
            "kv_cache_memory_bytes": (args.batch + 2) * room * model.token_bytes,
            # PyramidInfer prunes only prompts that always find room in one step.
            "max_num_batched_tokens": longest + args.batch,
            "enforce_eager": True,  # compiling takes longer than the answers
        }
    return {**chosen, **args.engine}


def _tokenizer(location: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(location)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ToolError(f"no tokenizer of {location!r}: {reason}") from None


def _stop_tokens(location: str, tokenizer: Any) -> list[int]:
    """What ends an answer, as vLLM finds it."""
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(location).eos_token_id
    except (OSError, ValueError):
        found = None
    more = found if isinstance(found, list) else [found]
    stops = {tokenizer.eos_token_id, *more} - {None}
    return sorted(stops)
