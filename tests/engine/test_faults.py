"""Servers that are killed, told to stop and started again, compared with stock vLLM.

All with requests in flight, prompts of which are compressed.
"""

import contextlib
import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.engine.served import free_port, serving
from vllm_kvcompress.tools.needle import model_path, needle_prompts

pytest.importorskip("vllm")

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1200)]

STOCK = [
    *("--block-size", "32", "--max-model-len", "4096", "--dtype", "float32"),
    *("--served-model-name", "needle", "--enforce-eager"),
]
COMPRESSED = [
    *(*STOCK, "--kv-compression", "snapkv", "--kv-compression-config.budget", "256"),
    *("--kv-compression-config.decode", '{"method": "rkv", "interval": 48}'),
]
COMPLETIONS = "/v1/completions"
FIRST_TOKENS = "vllm:time_to_first_token_seconds_count"
COMPRESSIONS = "vllm:kv_compression_compressions_total"
CLIENTS = 6
(NEEDLE,) = needle_prompts(num_tokens=1000, count=1)
SHORT = {"model": "needle", "prompt": NEEDLE.token_ids, "max_tokens": 4}
LONG = {**SHORT, "temperature": 0, "ignore_eos": True, "max_tokens": 1500}
PATIENCE = 100


@dataclass(frozen=True)
class Outcome:
    """What clients and whoever started the server see of its end.

    Attributes:
        answers: How requests in flight ended -> how many.
        exit_code: Of the server.
    """

    answers: Counter[str]
    exit_code: int


class Traffic:
    """Requests in flight, half of them streamed."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self._url, self._body = url, body
        self._begun = threading.Event()
        self._pool = ThreadPoolExecutor(CLIENTS)
        self._found: list[Future[str]] = [
            self._pool.submit(self._ask, stream=bool(i % 2)) for i in range(CLIENTS)
        ]
        assert self._begun.wait(PATIENCE)

    def _ask(self, stream: bool) -> str:
        """How a request ends, in a word or two."""
        body, reason = {**self._body, "stream": stream}, "broken off"
        try:
            with (
                httpx.Client(base_url=self._url, timeout=PATIENCE) as client,
                client.stream("POST", COMPLETIONS, json=body) as answer,
            ):
                if answer.status_code != 200:
                    return str(answer.status_code)
                for line in answer.iter_lines():
                    if stream and not line.startswith("data: {"):
                        continue
                    found = json.loads(line.removeprefix("data: "))
                    if "error" in found:
                        return "error in the stream"
                    self._begun.set()
                    reason = found["choices"][0]["finish_reason"] or reason
        except httpx.TimeoutException:
            return "hangs"
        except httpx.TransportError:
            return "connection lost"
        return reason

    def ends(self) -> Counter[str]:
        """Wait for all of them."""
        with self._pool:
            return Counter(future.result() for future in self._found)


@contextlib.contextmanager
def busy(flags: list[str], log: Path, **body: Any) -> Iterator[tuple[Any, Traffic]]:
    """A server with requests in flight, all of whose processes end."""
    with serving(model_path(), flags, log) as client:
        processes = psutil.Process(client.process.pid).children(recursive=True)
        client.processes = processes
        traffic = Traffic(str(client.base_url), {**LONG, **body})
        _wait_for(client, FIRST_TOKENS)
        if "--kv-compression" in flags:
            _wait_for(client, COMPRESSIONS)
        yield client, traffic
        _, alive = psutil.wait_procs(processes, timeout=60)
        assert not alive, "processes are left"


def _wait_for(client: httpx.Client, name: str) -> None:
    """Until something is counted once per client."""
    for _ in range(PATIENCE):
        text = client.get("/metrics").text
        for line in text.splitlines():
            if line.startswith(name) and float(line.rpartition(" ")[2]) >= CLIENTS:
                return
        time.sleep(0.5)
    pytest.fail(f"{name} stays below {CLIENTS}")


def killed(flags: list[str], log: Path) -> Outcome:
    """The engine's process is gone at once."""
    with busy(flags, log) as (client, traffic):
        (core,) = [p for p in client.processes if "EngineCore" in p.name()]
        core.kill()
        return Outcome(traffic.ends(), client.process.wait(PATIENCE))


def stopped(flags: list[str], log: Path, **body: Any) -> Outcome:
    """The server is told to stop."""
    with busy(flags, log, **body) as (client, traffic):
        client.process.send_signal(signal.SIGTERM)
        return Outcome(traffic.ends(), client.process.wait(PATIENCE))


def both(
    course: Callable[..., Outcome], folder: Path, *flags: str, **body: Any
) -> list[Outcome]:
    """What becomes of our server and, at the same time, of stock vLLM's."""
    arms = {"ours": [*COMPRESSED, *flags], "stock": [*STOCK, *flags]}
    with ThreadPoolExecutor(len(arms)) as pool:
        found = [
            pool.submit(course, own, folder / f"{name}.txt", **body)
            for name, own in arms.items()
        ]
        return [future.result() for future in found]


def test_a_killed_engine(tmp_path: Path) -> None:
    """Clients learn of it, and the server ends, as stock vLLM's: with exit code 0."""
    ours, stock = both(killed, tmp_path)
    assert not {"hangs", "length"} & ours.answers.keys(), ours
    assert ours.answers.keys() == stock.answers.keys()
    assert ours.exit_code == stock.exit_code


def test_a_stopped_server_breaks_off(tmp_path: Path) -> None:
    """Without a grace period; it ends when its clients have hung up, as stock vLLM.

    vLLM kills its engine at once, and does not always tell clients of it: a thread of
    its front end cancels the task that would, before or after it does.
    """
    ours, stock = both(stopped, tmp_path)
    for outcome in (ours, stock):
        assert "length" not in outcome.answers, outcome
    assert ours.exit_code == stock.exit_code


def test_a_stopped_server_answers_first(tmp_path: Path) -> None:
    """With a grace period all in flight are answered, compressed or not."""
    ours, stock = both(stopped, tmp_path, "--shutdown-timeout", "100", max_tokens=300)
    assert ours.answers == {"length": CLIENTS}
    assert ours == stock


def test_a_server_started_again(tmp_path: Path) -> None:
    """On the same port, while clients keep asking."""
    port, asked, ends = free_port(), threading.Event(), Counter[str]()

    def keep_asking(url: str) -> None:
        while not asked.is_set():
            try:
                # vLLM ends when clients that it has not told have hung up.
                answer = httpx.post(url + COMPLETIONS, json=SHORT, timeout=30)
                text = answer.json()["choices"][0]["text"] if answer.is_success else ""
                ends[f"{answer.status_code} {text.split()[:2]}"] += 1
            except httpx.TransportError:
                ends["connection lost"] += 1
                time.sleep(0.2)

    right = f"200 {NEEDLE.answer.split()}"
    with ThreadPoolExecutor(CLIENTS) as pool:
        try:
            with serving(model_path(), COMPRESSED, tmp_path / "1.txt", port) as client:
                url = str(client.base_url)
                clients = [pool.submit(keep_asking, url) for _ in range(CLIENTS)]
                _wait_for(client, COMPRESSIONS)
                client.process.send_signal(signal.SIGTERM)
                client.process.wait(PATIENCE)
            assert ends[right] >= CLIENTS
            with serving(model_path(), COMPRESSED, tmp_path / "2.txt", port) as client:
                before = ends[right]
                _wait_for(client, COMPRESSIONS)
                asked.set()
                for each in clients:
                    each.result(PATIENCE)
                assert ends[right] >= before + CLIENTS
        finally:
            asked.set()
    told = {"connection lost", "500 []", "503 []"}
    assert ends.keys() <= {right, *told}, ends
