"""`kvcompress bench serve`: a server per arm, and `vllm bench serve` at each load."""

import argparse
import json
import os
from collections.abc import Iterator

from ...arguments import budget_list, positive
from ...errors import ToolError
from ...scrape import scrape
from .arguments import add_common_arguments
from .arms import Arm
from .comparison import Comparison
from .folder import Record
from .points import Point, points, rate_list
from .server import HOST, Server, choose_port, serving
from .vllm_command import find_vllm, flags, last_words, process
from .watch import Watch

KIND = "serve"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add = parser.add_argument
    add(
        "--request-rates",
        type=rate_list,
        help="requests per second, a run each; inf: all at once (default 1,2,4,inf)",
    )
    add(
        "--concurrencies",
        type=budget_list,
        help="requests at once, a run each, such as 1,4,16",
    )
    add_common_arguments(parser, ("random", "sharegpt", "custom"))
    add("--port", type=positive, help="of the servers (default: one that is free)")
    add(
        "--start-timeout",
        type=positive,
        default=1800,
        metavar="SECONDS",
        help="that a server may take to start (default %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 if a run failed."""
    choose_port(args.port)
    loads = points(args.request_rates, args.concurrencies)
    comparison = Comparison.prepare(KIND, args, loads)
    return comparison.run(lambda arm, todo: _serve_arm(comparison, arm, todo))


def _serve_arm(
    comparison: Comparison, arm: Arm, todo: list[Point]
) -> Iterator[Record | ToolError]:
    """Start a server and yield a record, or why there is none, for each load.

    Raises:
        ToolError: The server did not come up, died, or is not what it should be.
    """
    args = comparison.args
    with serving(
        comparison.model.location,
        arm.engine(comparison.engine),
        port=args.port,
        log=comparison.folder.log(arm.label),
        patience_s=args.start_timeout,
    ) as server:
        if arm.method and scrape(f"{server.url}/metrics").settings is None:
            raise ToolError("the server does not compress; is the plugin installed?")
        _bench(comparison, arm, server, Point(), args.warmups, "warm-up")
        for point in todo:
            server.forget_prompts()
            try:
                yield _measure(comparison, arm, server, point)
            except ToolError as error:
                server.check_alive()
                yield ToolError(f"{point}: {error}")


def _measure(comparison: Comparison, arm: Arm, server: Server, point: Point) -> Record:
    """One run, watched."""
    with Watch(lambda: scrape(f"{server.url}/metrics")) as watch:
        result = _bench(
            comparison, arm, server, point, comparison.args.num_prompts, str(point)
        )
    server.check_alive()
    return comparison.record(KIND, arm, result, **watch.figures())


def _bench(
    comparison: Comparison,
    arm: Arm,
    server: Server,
    point: Point,
    prompts: int,
    name: str,
) -> Record:
    """Run `vllm bench serve` to its end and read its result.

    Raises:
        ToolError: It failed, or no request was answered.
    """
    log = comparison.folder.log(arm.label, name)
    file = log.with_suffix(".json")
    file.unlink(missing_ok=True)
    keywords = {
        "model": comparison.model.location,
        "host": HOST,
        "port": server.port,
        "temperature": 0,
        "ignore_eos": True,
        "disable_tqdm": True,
        "percentile_metrics": "ttft,tpot,itl,e2el",
        **comparison.bench_keywords(prompts),
        **vars(point),
        "save_result": True,
        "result_dir": str(file.parent),
        "result_filename": file.name,
    }
    # The prompts of a timed trace hang on how Python hashes text.
    own = {**os.environ, "PYTHONHASHSEED": "0"}
    command = [find_vllm(), "bench", "serve", *flags(keywords)]
    with process(command, log, own) as child:
        child.wait()
    if child.returncode or not file.exists():
        raise ToolError(f"vllm bench serve: {last_words(log)} (log: {log})")
    result = json.loads(file.read_text())
    if not result["completed"]:
        raise ToolError(f"no request was answered (log: {server.log})")
    return result
