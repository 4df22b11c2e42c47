"""A `vllm serve` for one arm."""

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ToolError
from .vllm_command import find_vllm, flags, last_words, process

HOST = "127.0.0.1"
POLL_S = 0.5
RESETS = 20


class StartError(ToolError):
    """A server did not come up; the message says why."""


@dataclass(frozen=True)
class Server:
    """A server that has answered.

    Attributes:
        port: Where it listens.
        log: What it says.
        child: Its process.
    """

    port: int
    log: Path
    child: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://{HOST}:{self.port}"

    def check_alive(self) -> None:
        """Raise ToolError if the process has ended."""
        if self.child.poll() is not None:
            raise ToolError(
                f"the server died: {last_words(self.log)} (log: {self.log})"
            )

    def forget_prompts(self) -> None:
        """Empty the prefix cache, so that no run finds the prompts of another.

        Raises:
            ToolError: The server does not.
        """
        import httpx

        for _ in range(RESETS):  # refused while a request still holds blocks
            self.check_alive()
            with contextlib.suppress(httpx.HTTPError):
                answer = httpx.post(f"{self.url}/reset_prefix_cache", timeout=60)
                if answer.is_success and answer.json().get("success", True):
                    return
            time.sleep(POLL_S)
        raise ToolError(f"the server does not empty its prefix cache (log: {self.log})")


def choose_port(wanted: int | None) -> int:
    """A port that is free now.

    Raises:
        ToolError: The wanted one is not.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted or 0))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", error)
            raise ToolError(f"--port {wanted} cannot be used: {reason}") from None
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(
    model: str,
    engine: Mapping[str, Any],
    *,
    port: int | None,
    log: Path,
    patience_s: float,
) -> Iterator[Server]:
    """Start a server, wait until it is healthy, and stop it at the end.

    Raises:
        StartError: It did not come up.
    """
    chosen = choose_port(port)
    command = [find_vllm(), "serve", model, "--host", HOST, "--port", str(chosen)]
    # Only a server in development lets its prefix cache be emptied.
    own = {**engine_environment(engine), "VLLM_SERVER_DEV_MODE": "1"}
    with process([*command, *flags(engine)], log, own) as child:
        server = Server(chosen, log, child)
        _wait_until_healthy(server, patience_s)
        yield server


def engine_environment(engine: Mapping[str, Any]) -> dict[str, str]:
    """The environment of a process that makes an engine."""
    own = dict(os.environ)
    if engine.get("kv_cache_memory_bytes"):
        own.pop("VLLM_CPU_KVCACHE_SPACE", None)  # the older way, which would win
    return own


def _wait_until_healthy(server: Server, patience_s: float) -> None:
    import httpx

    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if server.child.poll() is not None:
            raise StartError(
                f"the server does not start: {last_words(server.log)} "
                f"(log: {server.log})"
            )
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{server.url}/health", timeout=5).is_success:
                return
        time.sleep(POLL_S)
    raise StartError(
        f"the server was not healthy after {patience_s:g} s; give it more "
        f"with --start-timeout (log: {server.log})"
    )
