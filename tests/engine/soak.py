"""A server in little KV space under disorderly clients, for as long as is asked.

``make soak ARGS="--requests 2000"``. Clients ask for what was asked before, when the
server was idle, and have to get the same; some leave in the middle, some send what
nobody understands. The server checks its invariants in every so many steps.
"""

import argparse
import asyncio
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx

from tests.engine.served import serving
from tests.engine.soak_memory import Memory
from tests.engine.soak_requests import BAD, BLOCK, BLOCKS, FLAGS, Visit, kinds, visits
from vllm_kvcompress.tools.needle import model_path

CLIENTS, TIMEOUT = 24, 120
COMPLETIONS = "/v1/completions"
ALIKE = 0.1  # in log-probability
PREFIX = "vllm:kv_compression_"


@dataclass
class Report:
    """What came of a soak.

    Attributes:
        ends: How requests ended -> how many.
        wrong: One sentence on each thing that should not be.
        compared: Answers by how much of them was compared.
        memory: Process -> MB in the second and in the last quarter.
        metrics: Of the server when it is idle again.
        seconds: Of the load.
    """

    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    compared: Counter[str] = field(default_factory=Counter)
    memory: dict[str, tuple[float, float]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def check(self, holds: bool, what: str) -> None:
        """Note what does not hold."""
        if not holds:
            self.wrong.append(what)


class Soak:
    """The clients of one server."""

    def __init__(self, url: str, bodies: list[dict[str, Any]]) -> None:
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits)
        self.bodies, self.report = bodies, Report()
        self.expected: list[tuple[list[str], bool]] = []

    async def learn(self) -> None:
        """Ask for each kind while nobody else does.

        A prompt that waits for private blocks is answered as without compression
        until it gets some, so only what both answers begin with is certain.
        """
        for body in self.bodies:
            (words, whole), (full, _) = [
                await self._alone({**body, "vllm_xargs": xargs})
                for xargs in (body["vllm_xargs"], {"kv_compression": "off"})
            ]
            common = commonprefix([words, full])
            self.expected.append((common, whole and words == full))

    async def _alone(self, body: dict[str, Any]) -> tuple[list[str], bool]:
        body = {**body, "n": 1, "temperature": 0, "logprobs": 2}
        answer = await self.client.post(COMPLETIONS, json=body)
        answer.raise_for_status()
        (choice,) = answer.json()["choices"]
        return _certain(choice)

    async def load(self, planned: list[Visit]) -> None:
        """Go through all visits, some at a time."""
        started, left = time.perf_counter(), iter(planned)

        async def come_and_go() -> None:
            for visit in left:
                try:
                    await self._visit(visit)
                except httpx.HTTPError as error:
                    self.report.wrong.append(f"{visit}: {error!r}")

        await asyncio.gather(*(come_and_go() for _ in range(CLIENTS)))
        self.report.seconds = time.perf_counter() - started

    async def _visit(self, visit: Visit) -> None:
        end = visit.end
        if end == "bad":
            await self._send_nonsense(BAD[visit.kind])
        elif end == "whole":
            answer = await self.client.post(COMPLETIONS, json=self.bodies[visit.kind])
            if answer.status_code == 200:
                self._compare(visit, _texts(answer.json()))
            else:
                self.report.wrong.append(f"{visit}: {answer.status_code} {answer.text}")
        elif end == "streamed":
            self._compare(visit, await self._stream(visit))
        elif end.endswith("writing"):
            await self._stream(visit, most=int(visit.patience))
        else:
            try:
                async with asyncio.timeout(visit.patience):
                    await self.client.post(COMPLETIONS, json=self.bodies[visit.kind])
                end = "answered before the client left"
            except TimeoutError:
                pass
        self.report.ends[end] += 1

    async def _send_nonsense(self, body: bytes | dict[str, Any]) -> None:
        if isinstance(body, dict):
            body = json.dumps({"model": "needle", "max_tokens": 2, **body}).encode()
        headers = {"Content-Type": "application/json"}
        answer = await self.client.post(COMPLETIONS, content=body, headers=headers)
        refused = 400 <= answer.status_code < 500
        self.report.check(refused, f"{body[:200]!r}: {answer.status_code}")

    async def _stream(self, visit: Visit, most: int | None = None) -> list[str]:
        """Read an answer, or some pieces of it."""
        body = self.bodies[visit.kind]
        texts, pieces = [""] * body.get("n", 1), 0
        request = self.client.stream("POST", COMPLETIONS, json={**body, "stream": True})
        async with request as answer:
            good = answer.status_code == 200
            self.report.check(good, f"{visit}: {answer.status_code}")
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    piece = json.loads(line.removeprefix("data: "))
                    for choice in piece.get("choices", ()):
                        texts[choice["index"]] += choice["text"]
                    self.report.check("error" not in piece, f"{visit}: {line}")
                    pieces += 1
                if pieces == most:
                    break
        return texts

    def _compare(self, visit: Visit, found: list[str]) -> None:
        wanted, whole = self.expected[visit.kind]
        for text in found:
            words = text.split() if whole else text.split()[: len(wanted)]
            self.report.check(words == wanted, f"{visit}: {text!r} and not {wanted}")
            self.report.compared["whole" if whole else "a part"] += 1

    async def idle(self) -> None:
        """Wait until nobody is served, and look at what is left."""
        for _ in range(100):
            # The gauges are those of the last step.
            await self.client.post(COMPLETIONS, json={**self.bodies[0], "n": 1})
            found = _samples((await self.client.get("/metrics")).text)
            busy = [
                found[f"vllm:num_requests_{what}"] for what in ("running", "waiting")
            ]
            if not any(busy):
                break
            await asyncio.sleep(0.3)
        report = self.report
        report.metrics = found
        report.check(not any(busy), f"{busy} requests are left")
        usage = found["vllm:kv_cache_usage_perc"]
        report.check(usage == 0, f"{usage:.1%} of the blocks are still held")
        evicted = found[f"{PREFIX}tokens_evicted_total"]
        for what, other in {
            "freed tokens": found[f"{PREFIX}blocks_freed_total"] * BLOCK,
            "tokens before - after": found[f"{PREFIX}logical_tokens_total"]
            - found[f"{PREFIX}retained_tokens_total"],
        }.items():
            report.check(other == evicted, f"{evicted} tokens evicted, {other} {what}")


def _certain(choice: dict[str, Any]) -> tuple[list[str], bool]:
    """An answer's words up to where two are alike, and whether these are all.

    From there on the order of additions decides. Each token of the model is a word.
    """
    words = choice["text"].split()
    for count, best in enumerate(choice["logprobs"]["top_logprobs"]):
        first, second, *_ = sorted(best.values(), reverse=True)
        if first - second < ALIKE:
            return words[:count], False
    return words, True


def _texts(answer: dict[str, Any]) -> list[str]:
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    return [choice["text"] for choice in choices]


def _samples(text: str) -> Counter[str]:
    """All samples by name, labels summed up; 5xx answers as ``5xx``."""
    found: Counter[str] = Counter()
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, value = (
                re.split(r"[{ ]", line, maxsplit=1)[0],
                line.rpartition(" ")[2],
            )
            found[name] += float(value)
            found["5xx"] += 'status="5xx"' in line
    return found


def soak(requests: int, each: int, seed: int, log: Path) -> Report:
    """Start a server, serve, and report."""
    bodies, checking = kinds(48), {"VLLM_KVCOMPRESS_CHECK": str(each)}
    with patch.dict(os.environ, checking), serving(model_path(), FLAGS, log) as client:
        memory = Memory(client.process.pid)

        async def run() -> Report:
            course = Soak(str(client.base_url), bodies)
            async with course.client:
                await course.learn()
                watching = asyncio.create_task(memory.watch())
                await course.load(visits(requests, len(bodies), seed))
                await course.idle()
                watching.cancel()
            return course.report

        report = asyncio.run(run())
        report.memory = memory.quarters()
        alive = client.get("/health").status_code
        report.check(alive == 200, f"the server's health is {alive}")
    report.check(not report.metrics["5xx"], "the server counts answers of 5xx")
    text = log.read_text()
    idle = text.rfind("check: idle after")
    free = f"all {BLOCKS} blocks are free" in text[max(idle, 0) :]
    report.check(free, "the check mode saw no idle server with all blocks free")
    return report


def show(report: Report) -> None:
    """Print a report."""
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "count")
    for end, count in sorted(report.ends.items()):
        table.add_row(end, str(count))
    for much, count in report.compared.items():
        table.add_row(f"answers compared, {much}", str(count))
    for name in ("compressions", "tokens_evicted", "blocks_freed", "skipped"):
        count = report.metrics[f"{PREFIX}{name}_total"]
        table.add_row(f"counter {name}", f"{count:.0f}")
    count = report.metrics["vllm:num_preemptions_total"]
    table.add_row("preemptions", f"{count:.0f}")
    for name, (early, late) in report.memory.items():
        table.add_row(f"{name}, second and last quarter", f"{early:.0f}, {late:.0f} MB")
    table.add_row("seconds", f"{report.seconds:.0f}")
    table.add_row("wrong", str(len(report.wrong)))
    console = Console()
    console.print(table)
    for sentence in report.wrong[:20]:
        console.print(sentence[:500], markup=False)


def main() -> int:
    """Soak a server as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--check", type=int, default=20, help="each so many steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the report")
    given = parser.parse_args()
    log = Path(tempfile.mkdtemp()) / "server.log"
    print(f"The server's log: {log}", file=sys.stderr)
    report = soak(given.requests, given.check, given.seed, log)
    show(report)
    if given.json:
        given.json.write_text(json.dumps(vars(report), indent=1))
    return bool(report.wrong)


if __name__ == "__main__":
    sys.exit(main())
