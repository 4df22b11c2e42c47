"""`vllm serve` in a process of its own, and other calls of the command."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

VLLM = str(Path(sys.executable).with_name("vllm"))


def environment():
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    env.pop("TRITON_INTERPRET", None)
    return env


def vllm(*args):
    """Run the command to its end."""
    command = [VLLM, *args]
    return subprocess.run(
        command, cwd="/", env=environment(), text=True, capture_output=True
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(model, flags, log, port=None, patience=900):
    """A client of a server, whose output goes to ``log``.

    Args:
        model: Its path.
        flags: Of ``vllm serve``.
        log: A path.
        port: Of the server, None = a free one.
        patience: Seconds that the server may take to start.
    """
    port = port or free_port()
    command = [VLLM, "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *flags],
            cwd="/",
            env=environment(),
            stdout=output,
            stderr=output,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=120) as client:
            wait_until_healthy(client, process, log, patience)
            client.log, client.process = log, process
            yield client
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_until_healthy(client, process, log, patience):
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if client.get("/health").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise TimeoutError(log.read_text())
