"""`kvcompress bench throughput`: `vllm bench throughput`, arm by arm."""

import argparse
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ...errors import ToolError
from .arguments import add_common_arguments
from .arms import Arm
from .comparison import Comparison
from .folder import Record
from .points import Point
from .server import StartError, engine_environment
from .vllm_command import find_vllm, flags, last_words, process
from .watch import Watch, read_folder

KIND = "throughput"
COUNT = re.compile(r"^Total num (prompt|output) tokens: +(\d+)", re.MULTILINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add_common_arguments(parser, ("random", "sharegpt"))


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 if an arm failed."""
    comparison = Comparison.prepare(KIND, args, [Point()])
    return comparison.run(lambda arm, _: _measure(comparison, arm))


def _measure(comparison: Comparison, arm: Arm) -> Iterator[Record]:
    """Yield the record of an arm.

    Raises:
        StartError: It failed.
    """
    log = comparison.folder.log(arm.label)
    file = log.with_suffix(".json")
    file.unlink(missing_ok=True)
    engine = arm.engine(comparison.engine)
    keywords = {
        "model": comparison.model.location,
        **engine,
        **comparison.bench_keywords(comparison.args.num_prompts),
        "num_warmups": comparison.args.warmups,
        "output_json": str(file),
    }
    if comparison.traffic.input_len:
        keywords["input_len"] = comparison.traffic.input_len
    command = [find_vllm(), "bench", "throughput", *flags(keywords)]
    with tempfile.TemporaryDirectory(prefix="kvcompress-") as metrics:
        # It has no /metrics; this makes it keep them in files.
        own = {**engine_environment(engine), "PROMETHEUS_MULTIPROC_DIR": metrics}
        with (
            Watch(lambda: read_folder(metrics)) as watch,
            process(command, log, own) as child,
        ):
            child.wait()
    if child.returncode or not file.exists():
        raise StartError(f"vllm bench throughput: {last_words(log)} (log: {log})")
    if arm.method and not any(read.settings for read in watch.reads):
        raise ToolError("the engine does not compress; is the plugin installed?")
    result = json.loads(file.read_text())
    result |= _serve_names(result, log)
    yield comparison.record(KIND, arm, result, **watch.figures())


def _serve_names(result: Record, log: Path) -> Record:
    """The same figures in the words of ``vllm bench serve``."""
    counts = dict(COUNT.findall(log.read_text(errors="replace")))
    prompt, output = (int(counts[name]) for name in ("prompt", "output"))
    return {
        "request_rate": "inf",
        "max_concurrency": None,
        "completed": result["num_requests"],
        "duration": result["elapsed_time"],
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": result["requests_per_second"],
        "total_token_throughput": result["tokens_per_second"],
        "output_throughput": output / result["elapsed_time"],
    }
