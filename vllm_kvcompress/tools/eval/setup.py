"""From the command line to questions, arms, and who answers."""

import argparse
from collections.abc import Sequence
from typing import Any

from ..arguments import method_list
from ..bench_model import bench_model
from ..environment import environment
from ..errors import ToolError
from ..needle import model_path
from .conversation import Rules
from .engine import PROCESSOR, Engine
from .harness import LONGBENCH, PREFIX, HarnessRunner, check_installed, is_harness
from .plan import BUDGETS, BUNDLED_OWN_SETTINGS, OWN_SETTINGS, Plan, plan, sizes
from .questions import Item, make_items
from .runner import Runner
from .server import Connection, Server
from .tasks import Task, make_tasks

BUNDLED = "bundled needle model"
BLOCK_SIZE = 32  # of the bundled model's engines
Record = dict[str, Any]


def prepare(args: argparse.Namespace) -> tuple[list[Runner | HarnessRunner], Plan]:
    """Make all that is needed before the first arm runs.

    Returns:
        One runner for all tasks of ours and one for each of lm-evaluation-harness,
        and the arms.

    Raises:
        ToolError: Something of it is impossible.
    """
    tasks = choose_tasks(args)
    ours = [task for task in tasks.values() if task]
    theirs = [name for name, task in tasks.items() if task is None]
    if args.url:
        return _on_server(args, ours, theirs)
    if args.stock_url:
        raise ToolError("--stock-url needs --url, the server that compresses")
    return _on_engines(args, ours, theirs)


def choose_tasks(args: argparse.Namespace) -> dict[str, Task | None]:
    """The tasks by name; None for those of lm-evaluation-harness."""
    text = args.tasks or ("niah_single" if args.model or args.url else "needle")
    known = make_tasks(args.haystack, args.qa_file)
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if is_harness(name):
            check_installed(name)
            if args.question == "outside":
                raise ToolError(f"{name} puts its questions inside; drop --question")
        elif name not in known:
            allowed = ", ".join([*known, LONGBENCH, f"{PREFIX}NAME"])
            raise ToolError(f"unknown task {name!r}; allowed values: {allowed}")
    return {name: known.get(name) for name in names}


def _on_engines(
    args: argparse.Namespace, ours: Sequence[Task], theirs: Sequence[str]
) -> tuple[list[Runner | HarnessRunner], Plan]:
    location = args.model or model_path()
    name = args.model or BUNDLED
    tokenizer = _tokenizer(location)
    items = _items(args, ours, tokenizer)
    longest = max(
        (
            len(item.asked.prompt) + len(item.asked.question) + item.asked.max_tokens
            for item in items
        ),
        default=max(args.lengths),
    )
    keywords = _keywords(args, longest)
    default = None if args.keep_ratios else BUDGETS
    planned = plan(
        method_list(args.methods),
        sizes(args.budgets or default, args.keep_ratios),
        block_size=keywords.get("block_size"),
        common=args.config,
        own=OWN_SETTINGS if args.model else BUNDLED_OWN_SETTINGS,
    )
    runners: list[Runner | HarnessRunner] = []
    if ours:
        llm = {"model": location, "max_model_len": longest, **keywords}
        shown = {key: llm[key] for key in llm if key != "model"}
        if args.question == "outside" or args.fidelity_tokens:
            others = llm.get("logits_processors", [])
            llm["logits_processors"] = [*others, PROCESSOR]
        runners.append(
            Runner(
                root=args.out,
                common=_common(args, ours, name, "vllm", shown, forces=True),
                environment=environment(),
                tasks={task.name: task for task in ours},
                items=items,
                target=Engine(llm, args.batch),
                rules=_rules(args, location, tokenizer, forces=True),
                tokenizer=tokenizer,
            )
        )
    for task in theirs:
        runners.append(
            HarnessRunner(
                root=args.out,
                common=_harness_common(args, task, name, keywords),
                environment=environment(),
                task=task,
                engine=Engine({"model": location, **keywords}, args.batch),
            )
        )
    return runners, planned


def _on_server(
    args: argparse.Namespace, ours: Sequence[Task], theirs: Sequence[str]
) -> tuple[list[Runner | HarnessRunner], Plan]:
    for flag in ("keep_ratios", "config", "engine"):
        if getattr(args, flag):
            name = flag.replace("_", "-")
            raise ToolError(f"--{name} says how an engine is started; drop it or --url")
    if theirs:
        raise ToolError(f"{theirs[0]} starts engines of its own; drop it or --url")
    compressed = Connection(args.url)
    stock = Connection(args.stock_url) if args.stock_url else compressed
    target = Server(compressed, stock, args.batch)
    settings = target.settings()
    fixed = settings.get("budget", "")
    budgets = args.budgets or ([int(fixed)] if fixed.isdecimal() else None)
    methods = method_list(args.methods or settings["method"])
    planned = plan(methods, sizes(budgets, None), own={})
    location = args.model or compressed.root
    try:
        tokenizer = _tokenizer(location)
    except ToolError as error:
        raise ToolError(f"{error}; --model says where it is") from None
    items = _items(args, ours, tokenizer)
    outside = args.question == "outside"
    forces = (outside or args.fidelity_tokens > 0) and target.forces(
        items[0].asked.prompt, needed=outside
    )
    shown = {"url": compressed.url, "stock_url": stock.url, "server": settings}
    runner = Runner(
        root=args.out,
        common=_common(args, ours, compressed.root, "url", shown, forces),
        environment={**environment(), "server_vllm": compressed.version()},
        tasks={task.name: task for task in ours},
        items=items,
        target=target,
        rules=_rules(args, location, tokenizer, forces),
        tokenizer=tokenizer,
    )
    return [runner], planned


def _common(
    args: argparse.Namespace,
    tasks: Sequence[Task],
    model: str,
    target: str,
    engine: Record,
    forces: bool,
) -> Record:
    """What all arms that answer the same questions share."""
    followed = "forced" if forces else "prefix"
    return {
        "model": model,
        "question": args.question,
        "target": target,
        "tasks": [task.name for task in tasks],
        "lengths": args.lengths,
        "depths": args.depths,
        "samples": args.samples,
        "seed": args.seed,
        "haystack": args.haystack,
        "qa_file": args.qa_file and str(args.qa_file),
        "fidelity": followed if args.fidelity_tokens else None,
        "fidelity_tokens": args.fidelity_tokens,
        "engine": engine,
    }


def _harness_common(
    args: argparse.Namespace, task: str, model: str, engine: Record
) -> Record:
    """The same for a task of lm-evaluation-harness."""
    return {
        "model": model,
        "question": "inside",
        "target": "vllm",
        "tasks": [task],
        "lengths": [],
        "depths": None,
        "samples": args.samples,
        "seed": args.seed,
        "fidelity": None,
        "engine": engine,
    }


def _items(
    args: argparse.Namespace, tasks: Sequence[Task], tokenizer: Any
) -> list[Item]:
    return make_items(
        tokenizer,
        tasks,
        lengths=args.lengths,
        depths=args.depths,
        samples=args.samples,
        seed=args.seed,
        outside=args.question == "outside",
    )


def _rules(
    args: argparse.Namespace, location: str, tokenizer: Any, forces: bool
) -> Rules:
    return Rules(args.fidelity_tokens, forces, _stop_tokens(location, tokenizer))


def _keywords(args: argparse.Namespace, longest: int) -> Record:
    """Keyword arguments of `vllm.LLM`, but for the model; the user's win."""
    chosen: Record = {"max_num_seqs": args.batch}
    if not args.model:
        model = bench_model(model_path())
        room = longest + 4 * BLOCK_SIZE
        chosen |= {
            "max_model_len": longest,
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
    return sorted({tokenizer.eos_token_id, *more} - {None})
