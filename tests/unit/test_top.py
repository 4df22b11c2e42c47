"""`kvcompress top` against a small HTTP server with a real server's answers."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from vllm_kvcompress.tools.errors import ToolError
from vllm_kvcompress.tools.main import main
from vllm_kvcompress.tools.scrape import NAMES, OURS, metrics_url, scrape
from vllm_kvcompress.tools.top.figures import rates, restarted

# `vllm serve` with the bundled model, SnapKV and compression of answers, at two times
# two seconds apart; metrics that nothing here reads are left out.
DATA = Path(__file__).parent / "data"
FIRST = (DATA / "metrics-first.txt").read_text()
SECOND = (DATA / "metrics-second.txt").read_text()
STOCK = "".join(line for line in FIRST.splitlines(True) if OURS not in line)
TWO_ENGINES = FIRST + "".join(
    line.replace('engine="0"', 'engine="1"')
    for line in SECOND.splitlines(True)
    if not line.startswith(("#", "process"))
)
COMMAND = [sys.executable, "-m", "vllm_kvcompress.tools.main", "top"]


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Shells have what they start in the background ignore SIGINT; children inherit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Server(HTTPServer):
    """Gives each of its pages once, the last one for ever."""

    def __init__(self, *pages: str | int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages = list(pages)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def next_page(self) -> str | int:
        return self.pages.pop(0) if len(self.pages) > 1 else self.pages[0]


class Handler(BaseHTTPRequestHandler):
    """A number is a status, or a text that is cut short where it is 200."""

    server: Server

    def do_GET(self) -> None:
        page = self.server.next_page()
        self.send_response(page if isinstance(page, int) else 200)
        text = FIRST if isinstance(page, int) else page
        cut = 100 if page == 200 else 0
        self.send_header("Content-Length", str(len(text.encode()) + cut))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_) -> None:
        pass


@contextmanager
def serving(*pages: str | int) -> Iterator[Server]:
    with Server(*pages) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def once(capsys, page: str) -> dict:
    with serving(page) as server:
        assert main(["top", server.url, "--once", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_one_read_as_json(capsys) -> None:
    read = once(capsys, FIRST)
    assert read["models"] == ["needle"]
    assert read["settings"]["method"] == "snapkv"
    assert read["settings"]["budget"] == "256"
    assert "keep_ratio" not in read["settings"]  # not given
    total = read["total"]
    assert {*NAMES.values()} < {*total}
    assert (total["running"], total["waiting"]) == (6, 0)
    assert total["kv_cache_usage"] == pytest.approx(0.0073, abs=1e-4)
    assert (total["generation_tokens"], total["compressions"]) == (4138, 84)
    assert (total["skipped_short"], total["skipped_invalid"]) == (3, 0)
    assert total["retained_share"] == 20520 / 33576
    assert total["prefix_cache_hit_share"] == 10944 / 15615
    assert total["seconds_per_compression"] == pytest.approx(0.239156 / 84)
    assert read["per_second"] is None
    assert read["engines"] == {"0": {"total": total, "per_second": None}}


def test_one_read_as_a_table(capsys) -> None:
    with serving(FIRST) as server:
        assert main(["top", server.url, "--once"]) == 0
    shown = capsys.readouterr().out
    for part in (
        f"needle at {server.url}/metrics",
        "6 running, 0 waiting; KV cache: 0.7% in use",
        "KV compression: snapkv, budget=256",
    ):
        assert part in shown
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in shown.splitlines()]
    for row in (
        ["generation tokens", "4,138", "-"],
        ["tokens evicted", "13,056", "-"],
        ["tokens retained", "61.1%", "-"],
        ["left alone: short", "3", "-"],
    ):
        assert row in rows
    assert "pool_dry" not in shown  # a reason that did not occur


def test_server_without_compression(capsys) -> None:
    assert once(capsys, STOCK)["settings"] is None
    with serving(STOCK) as server:
        assert main(["top", server.url, "--once"]) == 0
    shown = capsys.readouterr().out
    assert "KV compression: none" in shown
    assert "4,138" in shown
    assert "evicted" not in shown


def test_engines_are_summed_and_listed(capsys) -> None:
    read = once(capsys, TWO_ENGINES)
    first, second = (read["engines"][engine]["total"] for engine in "01")
    assert read["total"]["compressions"] == 84 + 120
    assert (first["compressions"], second["compressions"]) == (84, 120)
    assert read["total"]["retained_share"] == (20520 + 29340) / (33576 + 44124)
    assert read["total"]["kv_cache_usage"] == first["kv_cache_usage"] / 2
    with serving(TWO_ENGINES) as server:
        assert main(["top", server.url, "--once"]) == 0
    (row,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("│ 1 ")]
    assert row.split("│")[-3].strip() == "120"


def test_rates() -> None:
    """Between two reads, over the time that has passed in truth."""
    with serving(FIRST, SECOND) as server:
        before = scrape(server.url)
        time.sleep(0.2)
        now = scrape(server.url)
    assert rates(None, now) is None
    speeds = rates(before, now)
    assert speeds is not None
    seconds = now.time - before.time
    assert seconds >= 0.2
    assert speeds["0"]["compressions"] == pytest.approx(36 / seconds)
    assert speeds["0"]["generation_tokens"] == pytest.approx(1682 / seconds)
    assert speeds["0"]["preemptions"] == 0
    assert "running" not in speeds["0"]


def test_restarted_server_has_no_rates() -> None:
    other_start = SECOND.replace("1.79532149592e+09", "1.8e+09")
    with serving(SECOND, FIRST, SECOND, other_start) as server:
        late, early, again, moved = (scrape(server.url) for _ in range(4))
    assert restarted(late, early)
    assert rates(late, early) is None
    assert not restarted(early, again)
    assert restarted(again, moved)
    assert rates(again, moved) is None


@pytest.mark.parametrize(
    ("page", "told"),
    [
        (500, "answered 500"),
        (404, "answered 404"),
        (200, "does not answer: IncompleteRead"),
        ("<!DOCTYPE html>\n<html><body>Hi</body></html>\n", "not with metrics"),
        ('{"status": "ok"}', "not with metrics"),
        ("", "has no metrics of vLLM"),
        ("# TYPE up gauge\nup 1\n", "has no metrics of vLLM"),
    ],
)
def test_bad_answer_is_one_line(capsys, page, told) -> None:
    with serving(page) as server:
        assert main(["top", server.url, "--once"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"kvcompress top: error: {server.url}/metrics ")
    assert told in line


def test_nobody_listens(capsys) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert main(["top", f"127.0.0.1:{taken.getsockname()[1]}", "--json"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("refused")


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("localhost", "http://localhost:8000/metrics"),
        ("localhost:81", "http://localhost:81/metrics"),
        ("localhost:81/", "http://localhost:81/metrics"),
        ("localhost:81/metrics", "http://localhost:81/metrics"),
        ("http://10.0.0.1:81/v1/", "http://10.0.0.1:81/metrics"),
        ("https://llm.example", "https://llm.example/metrics"),
        ("https://llm.example/a/metrics?x=1", "https://llm.example/a/metrics"),
        ("[::1]:81", "http://[::1]:81/metrics"),
    ],
)
def test_address(text, url) -> None:
    assert metrics_url(text) == url


@pytest.mark.parametrize("text", ["", "http://", "ftp://a", "a:b", "a:99999", "[::1"])
def test_bad_address(text) -> None:
    with pytest.raises(ToolError, match="is no address of a server"):
        metrics_url(text)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "x"])
def test_bad_interval(capsys, text) -> None:
    assert main(["top", "localhost", "--interval", text]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_live_view_needs_a_terminal(capsys) -> None:
    with serving(FIRST) as server:
        assert main(["top", server.url]) == 1
    assert "needs a terminal" in capsys.readouterr().err


def test_stream_of_json() -> None:
    pages = FIRST, SECOND, 500, FIRST
    with serving(*pages) as server:
        process = subprocess.Popen(
            [*COMMAND, server.url, "--json", "--interval", "0.1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
        )
        first, second, failed, again = (
            json.loads(process.stdout.readline()) for _ in pages
        )
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, b"")
    assert first["per_second"] is None
    share = (29340 - 20520) / (44124 - 33576)
    assert second["per_second"]["retained_share"] == pytest.approx(share)
    assert second["engines"]["0"]["per_second"] == second["per_second"]
    assert "answered 500" in failed["error"]
    assert again["per_second"] is None  # fewer than before: another server


def test_reader_goes_away() -> None:
    with serving(FIRST) as server:
        process = subprocess.Popen(
            [*COMMAND, server.url, "--json", "--interval", "0.05"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
        )
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 0


class Terminal:
    """A process in a terminal of its own, and what it has shown."""

    def __init__(self, command: list[str]) -> None:
        self.ours, theirs = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, cwd="/", env=env
        )
        os.close(theirs)
        self.shown = ""

    def wait_for(self, text: str) -> None:
        self.shown = ""
        while text not in self.shown:
            self.shown += os.read(self.ours, 4096).decode(errors="replace")

    def interrupt(self) -> str:
        """Send what Ctrl-C sends; gives what is shown from then on."""
        self.process.send_signal(signal.SIGINT)
        rest = b""
        try:
            while more := os.read(self.ours, 4096):
                rest += more
        except OSError:  # how Linux says that the other side has closed
            pass
        os.close(self.ours)
        assert self.process.wait(30) == 0
        return rest.decode(errors="replace")


@pytest.mark.timeout(60)
def test_live_view() -> None:
    """It goes on through silence and a restart, and ends quietly."""
    with serving(FIRST) as server:
        terminal = Terminal([*COMMAND, server.url, "--interval", "0.05"])
        terminal.wait_for("4,138")
        server.pages = [SECOND]
        terminal.wait_for("5,820")
        server.pages = [503]
        terminal.wait_for("answered 503")
        assert re.search(r"since \d\d:\d\d:\d\d: http", terminal.shown)
        terminal.wait_for("5,820")  # the screen is kept
        server.pages = [FIRST]
        terminal.wait_for("began anew")
        terminal.wait_for("0.0/s")
        rest = terminal.interrupt()
    assert "Traceback" not in rest
    assert "Interrupt" not in rest
    assert "\x1b[?25h" in rest  # the cursor is back


@pytest.mark.vllm
def test_record_has_all_of_our_metrics() -> None:
    pytest.importorskip("vllm")
    from vllm_kvcompress.engine.metrics import COUNTERS, REASONS

    for name in COUNTERS:
        assert f"\n{OURS}{name}_total{{" in FIRST
        assert name in NAMES.values()
    for reason in REASONS:
        assert f'reason="{reason}"' in FIRST
