"""A comparison from flags to its end: what serving and throughput have in common."""

import argparse
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...arguments import method_list
from ...bench_model import OWN_SHAPES
from ...errors import ToolError
from .arms import FP8, STOCK, Arm, plan_arms
from .folder import Record, ResultFolder
from .points import Point
from .server import StartError
from .traffic import TRACE, Traffic, traffic
from .vllm_command import find_vllm

if TYPE_CHECKING:
    from ...bench_model import BenchModel

OWN_SPACE = 2**30


@dataclass(frozen=True)
class Comparison:
    """What runs, and where its results go.

    Attributes:
        args: The flags.
        model: What all arms run.
        arms: Stock first.
        points: The loads of each arm.
        traffic: The requests of each run.
        engine: Keywords of LLM for all arms.
        folder: The results.
    """

    args: argparse.Namespace
    model: "BenchModel"
    arms: list[Arm]
    points: Sequence[Point]
    traffic: Traffic
    engine: dict[str, Any]
    folder: ResultFolder

    @classmethod
    def prepare(
        cls, kind: str, args: argparse.Namespace, points: Sequence[Point]
    ) -> "Comparison":
        """Check everything that can be wrong before an engine starts.

        Raises:
            ToolError: Something is.
        """
        from ...bench_model import bench_model
        from ...environment import environment, warn_if_busy

        find_vllm()
        requests = traffic(args)
        fp8 = not args.no_fp8 and "kv_cache_dtype" not in args.engine
        methods = method_list(args.methods)
        arms = plan_arms(methods, args.budgets, args.config, fp8=fp8)
        model = bench_model(args.model)
        own_space = OWN_SPACE if args.model in OWN_SHAPES else None
        engine = {
            "dtype": model.dtype,
            "max_model_len": args.max_model_len or requests.longest,
            "kv_cache_memory_bytes": args.kv_space or own_space,
            **args.engine,
        }
        config = {
            "kind": kind,
            "model": args.model,
            "about": model.about,
            "arms": [vars(arm) for arm in arms],
            "points": [vars(point) for point in points],
            "traffic": requests.about(),
            "num_prompts": args.num_prompts,
            "warmups": args.warmups,
            "seed": args.seed,
            "engine": engine,
            "bench": args.bench,
        }
        name = f"{kind}-{Path(args.model).name}-{requests.name}"
        machine = environment()
        folder = ResultFolder(args.out, name, config, machine)
        warn_if_busy(machine)
        if requests.trace:
            folder.write(TRACE, requests.trace)
        return cls(args, model, arms, points, requests, engine, folder)

    def record(self, kind: str, arm: Arm, result: Record, **more: Any) -> Record:
        """vLLM's result, and what else is known of the run."""
        return {
            "failed": 0,
            **result,
            "kind": kind,
            "arm": arm.label,
            "method": arm.method,
            "dataset": self.traffic.dataset,
            "input_len": self.traffic.input_len,
            "output_len": self.traffic.output_len,
            **more,
        }

    def bench_keywords(self, prompts: int) -> dict[str, Any]:
        """The flags of vLLM's benchmark that do not differ between arms."""
        traced = {"dataset_path": str(self.folder.path / TRACE)}
        return {
            **self.traffic.flags,
            **(traced if self.traffic.trace else {}),
            "num_prompts": prompts,
            "seed": self.args.seed,
            **self.args.bench,
        }

    def run(
        self, measure: Callable[[Arm, list[Point]], Iterator[Record | ToolError]]
    ) -> int:
        """Measure what is not done yet, and show all of it.

        Args:
            measure: Yields a record, or why there is none, for each load.

        Returns:
            1 if a run failed.

        Raises:
            ToolError: Stock vLLM does not start, or results cannot be written.
        """
        from rich.console import Console

        from ...progress import progress_bars, task_adder
        from .report import record_of, show

        for wish in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(wish, lambda number, _: sys.exit(128 + number))
        notes = Console(stderr=True, highlight=False, soft_wrap=True)
        failed = 0
        with progress_bars() as bars:
            add_task = task_adder(bars)
            for arm in self.arms:
                records = self.folder.records
                todo = [p for p in self.points if not record_of(records, arm.label, p)]
                update = add_task(arm.label)
                with closing(_outcomes(measure, arm, todo)) as outcomes:
                    for number, outcome in enumerate(outcomes, 1):
                        if not isinstance(outcome, ToolError):
                            self.folder.add(outcome)
                        elif arm.label == FP8 and isinstance(outcome, StartError):
                            notes.print(f"note: {arm.label} is left out: {outcome}")
                        else:
                            failed += 1
                            notes.print(f"failed: {arm.label}: {outcome}")
                        update(number / len(todo))
                update(1.0)
        show(self.points, self.arms, self.folder.records)
        notes.print(f"results: {self.folder.path}")
        return int(failed > 0)


def _outcomes(
    measure: Callable[[Arm, list[Point]], Iterator[Record | ToolError]],
    arm: Arm,
    todo: list[Point],
) -> Generator[Record | ToolError]:
    """An arm's records, and its failures; without stock there is no comparison."""
    if not todo:
        return
    try:
        yield from measure(arm, todo)
    except StartError as error:
        if arm.label == STOCK:
            raise ToolError(f"{arm.label}: {error}") from None
        yield error
    except ToolError as error:
        yield error
