"""A page in a real browser without a network, over Chromium's DevTools protocol."""

import json
import shutil
import subprocess
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
_START_S = 60


class Browser:
    """One tab; what it asked for and complained of is in `requests` and `errors`."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._sent = 0
        self._loaded = False
        self.requests: list[str] = []
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params}
        self._socket.send(json.dumps(message))
        while (answer := self._receive()).get("id") != self._sent:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        message = json.loads(self._socket.recv(timeout=_START_S))
        what, params = message.get("method"), message.get("params")
        if what == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif what in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.errors.append(json.dumps(params))
        elif what == "Runtime.consoleAPICalled":
            self.errors.append(json.dumps(params["args"]))
        elif what == "Page.loadEventFired":
            self._loaded = True
        return message

    def open(self, file: Path) -> None:
        """Open a file and wait until it is loaded."""
        self._loaded = False
        self.call("Page.navigate", url=file.resolve().as_uri())
        while not self._loaded:
            self._receive()

    def width(self, pixels: int) -> None:
        """Give the page another width."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=pixels,
            height=900,
            deviceScaleFactor=1,
            mobile=pixels < 500,
        )

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, file: Path) -> bytes:
        """Write a picture of the whole page."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(b64decode(answer["data"]))
        return file.read_bytes()

    def pdf(self, file: Path) -> bytes:
        """Print the page."""
        file.write_bytes(b64decode(self.call("Page.printToPDF")["data"]))
        return file.read_bytes()


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start the browser, with all host names unknown, and end it."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    options += ["--remote-debugging-port=0", f"--user-data-dir={profile}"]
    options += ["--disable-background-networking", "--disable-dev-shm-usage"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", "about:blank"]
    process = subprocess.Popen([BROWSER, *options], stderr=subprocess.DEVNULL)
    try:
        port_file = profile / "DevToolsActivePort"
        end = time.monotonic() + _START_S
        while not port_file.exists() or not port_file.read_text():
            assert time.monotonic() < end and process.poll() is None, "no browser"
            time.sleep(0.1)
        port = port_file.read_text().split()[0]
        tabs = httpx.get(f"http://127.0.0.1:{port}/json", trust_env=False).json()
        (address,) = [t["webSocketDebuggerUrl"] for t in tabs if t["type"] == "page"]
        with connect(address, max_size=None, proxy=None) as socket:
            yield Browser(socket)
    finally:
        process.terminate()
        process.wait(timeout=_START_S)
