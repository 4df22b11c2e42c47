"""A server in little KV space under disorderly clients, for as long as is asked.

``make soak ARGS="--requests 2000"``. Clients ask for what was asked before, when the
server was idle, and have to get the same; some leave in the middle, some send what
nobody understands. The server checks its invariants in every so many steps. With
``--stock`` it is vLLM without this package, for comparison. Flags that are not known
here, such as ``--speculative-config``, go to the server; with ``--kv-compression`` they
replace those that compress.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx

from tests.engine.served import serving
from tests.engine.soak_answers import (
    Expected,
    Words,
    certain_words,
    texts_of,
    usage_of,
)
from tests.engine.soak_memory import Memory
from tests.engine.soak_report import PREFIX, Report, show
from tests.engine.soak_requests import (
    BAD,
    BAD_SETTINGS,
    BLOCK,
    FLAGS,
    STOCK_FLAGS,
    Visit,
    kinds,
    visits,
)
from vllm_kvcompress.tools.needle import model_path

CLIENTS, TIMEOUT = 24, 120
COMPLETIONS = "/v1/completions"
# oneDNN keeps a compiled kernel for each new number of tokens, stock vLLM's as well;
# with its 1,024 places a worker grows by some 100 MB per 1,000 requests until they
# are full.
CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
# In the second half of so many requests, MB per 1,000: in the first 1,000 much is new.
LASTING, MOST_GROWTH = 2000, 20


class Soak:
    """The clients of one server.

    Args:
        url: Its address.
        bodies: What is asked.
        stock: Whether it knows nothing of compression.
    """

    def __init__(self, url: str, bodies: list[dict[str, Any]], stock: bool) -> None:
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits)
        self.bodies, self.report, self.stock = bodies, Report(), stock
        self.expected: list[Expected] = []

    async def learn(self) -> None:
        """Ask for each kind while nobody else does."""
        for body in self.bodies:
            off = {"kv_compression": "off"}
            plain = await self._alone({**body, "vllm_xargs": off})
            compressed = plain if self.stock else await self._alone(body)
            self.expected.append(Expected(compressed, plain))

    async def _alone(self, body: dict[str, Any]) -> Words:
        body = {**body, "n": 1, "temperature": 0, "logprobs": 2}
        answer = await self.client.post(COMPLETIONS, json=body)
        answer.raise_for_status()
        found = answer.json()
        waited = usage_of(found).get("waited")
        self.report.check(not waited, f"alone, {body} waited {waited} steps")
        (choice,) = found["choices"]
        return certain_words(choice)

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
            await self._send_nonsense(visit.kind)
        elif end == "whole":
            answer = await self.client.post(COMPLETIONS, json=self.bodies[visit.kind])
            if answer.status_code == 200:
                found = answer.json()
                texts = texts_of(found)
                # Of several it tells about one only.
                usage = usage_of(found) if len(texts) == 1 else None
                self._compare(visit, texts, usage)
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

    async def _send_nonsense(self, kind: int) -> None:
        body = (BAD + BAD_SETTINGS)[kind]
        if isinstance(body, dict):
            body = json.dumps({"model": "needle", "max_tokens": 2, **body}).encode()
        headers = {"Content-Type": "application/json"}
        answer = await self.client.post(COMPLETIONS, content=body, headers=headers)
        least = 200 if self.stock and kind >= len(BAD) else 400
        refused = least <= answer.status_code < 500
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

    def _compare(
        self, visit: Visit, found: list[str], usage: dict[str, Any] | None = None
    ) -> None:
        (wanted, whole), how = self.expected[visit.kind].given(usage)
        for text in found:
            words = text.split() if whole else text.split()[: len(wanted)]
            right = f"{text!r} and not {wanted}, {how} by {usage}"
            self.report.check(words == wanted, f"{visit}: {right}")
            self.report.compared[how] += 1

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
        if self.stock:
            return
        evicted = found[f"{PREFIX}tokens_evicted_total"]
        for what, other in {
            "freed but not merged": found[f"{PREFIX}blocks_freed_total"] * BLOCK
            - found[f"{PREFIX}tokens_merged_total"],
            "tokens before - after": found[f"{PREFIX}logical_tokens_total"]
            - found[f"{PREFIX}retained_tokens_total"],
        }.items():
            report.check(other == evicted, f"{evicted} tokens evicted, {other} {what}")


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


def soak(
    requests: int,
    each: int,
    seed: int,
    log: Path,
    stock: bool = False,
    more: Sequence[str] = (),
) -> Report:
    """Start a server, serve, and report.

    Args:
        requests: How many.
        each: Steps, of which one is checked.
        seed: Of the clients' behaviour.
        log: Where the server's output goes.
        stock: Whether the server is vLLM without this package.
        more: Flags of the server, instead of ours if they compress.
    """
    plain = stock or "--kv-compression" in more
    flags = [*(STOCK_FLAGS if plain else FLAGS), *more]
    # Beside drafts stock vLLM 0.32 on a processor crashes on a request with top_k.
    bodies = kinds(48, several="--speculative-config" not in more)
    own = {"VLLM_PLUGINS": ""} if stock else {"VLLM_KVCOMPRESS_CHECK": str(each)}
    if small := CACHE not in os.environ:
        own[CACHE] = "16"
    with patch.dict(os.environ, own), serving(model_path(), flags, log) as client:
        memory = Memory(client.process.pid)

        async def run() -> Report:
            course = Soak(str(client.base_url), bodies, stock)
            async with course.client:
                await course.learn()
                watching = asyncio.create_task(memory.watch(course.report.ends.total))
                await course.load(visits(requests, len(bodies), seed))
                await course.idle()
                watching.cancel()
            return course.report

        report = asyncio.run(run())
        if requests >= LASTING:
            report.memory = memory.growth(requests)
        alive = client.get("/health").status_code
        report.check(alive == 200, f"the server's health is {alive}")
    for name, (*_, more_mb) in report.memory.items():
        steady = not small or more_mb < MOST_GROWTH
        report.check(steady, f"{name} grows by {more_mb:.0f} MB per 1,000 requests")
    report.check(not report.metrics["5xx"], "the server counts answers of 5xx")
    if not stock:
        idle = "check: idle after" in log.read_text()  # it counts the free blocks
        report.check(idle, "the check mode saw no idle server")
    return report


def main() -> int:
    """Soak a server as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--check", type=int, default=20, help="each so many steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stock", action="store_true", help="vLLM without the plugin")
    parser.add_argument("--json", type=Path, help="where to write the report")
    given, more = parser.parse_known_args()
    log = Path(tempfile.mkdtemp()) / "server.log"
    print(f"The server's log: {log}", file=sys.stderr)
    report = soak(given.requests, given.check, given.seed, log, given.stock, more)
    show(report)
    if given.json:
        given.json.write_text(json.dumps(vars(report), indent=1))
    return bool(report.wrong)


if __name__ == "__main__":
    sys.exit(main())
