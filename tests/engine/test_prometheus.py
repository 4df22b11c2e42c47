"""A real Prometheus scrapes a real server, and is asked what the dashboard asks."""

import bisect
import contextlib
import json
import math
import re
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import vllm_kvcompress
from tests.engine.served import serving
from vllm_kvcompress.tools.main import main

pytest.importorskip("vllm")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not shutil.which("prometheus"), reason="no `prometheus` on PATH"
    ),
]

MODEL = Path(vllm_kvcompress.__file__).parent / "assets" / "needle"
FLAGS = [
    *("--kv-compression", "snapkv", "--kv-compression-config.budget", "256"),
    *("--block-size", "32", "--max-model-len", "2048", "--dtype", "float32"),
    *("--served-model-name", "ann's [needle] v1.0+", "--enforce-eager"),
]
PROMPT = [1, *(4 + i % 200 for i in range(999))]
DASHBOARD = files("vllm_kvcompress.configs") / "grafana" / "vllm-kvcompress.json"
BOARD = json.loads(DASHBOARD.read_text())
EXPRESSIONS = [t["expr"] for panel in BOARD["panels"] for t in panel["targets"]]
# A rate is extrapolated from the first and the last scrape to its interval's ends.
EXTRAPOLATED = 0.1


@contextlib.contextmanager
def scraping(target, folder):
    """A client of a Prometheus that scrapes ``target`` each second."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    job = {"job_name": "vllm", "static_configs": [{"targets": [target]}]}
    config = {"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    log = folder / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=output,
            stderr=output,
        )
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=30) as client:
            wait_until_ready(client, process, log)
            yield client
    finally:
        process.terminate()
        process.wait(60)


def wait_until_ready(prometheus, process, log):
    for _ in range(120):
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(httpx.TransportError):
            if prometheus.get("/-/ready").is_success:
                return
        time.sleep(0.5)
    raise TimeoutError(log.read_text())


def answer(prometheus, path, **params):
    """The data of an answer."""
    body = prometheus.get(f"/api/v1/{path}", params=params).json()
    assert body["status"] == "success", (params, body)
    return body["data"]


def samples(server):
    """What the server's /metrics says, summed over all labels but a bucket's bound."""
    found = {}
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            bound = sample.labels.get("le")
            key = sample.name if bound is None else (sample.name, float(bound))
            found[key] = found.get(key, 0) + sample.value
    return found


def choose_all(text, variables):
    """Insert template variables as Grafana does when All is selected."""
    for name, values in variables.items():
        quoted = [re.sub(r"[\\^$.|?*+()\[\]{}]", r"\\\\\g<0>", v) for v in values]
        inserted = quoted[0] if len(quoted) == 1 else f"({'|'.join(quoted)})"
        text = text.replace(f"${name}", inserted)
    assert "$" not in text, text
    return text


def label_values(prometheus, definition, variables):
    """Answer a template variable's query as Grafana's data source does."""
    call = re.fullmatch(r"label_values\((.+), (\w+)\)", definition)
    selector, label = call.groups()
    match = {"match[]": choose_all(selector, variables)}
    return answer(prometheus, f"label/{label}/values", **match)


@dataclass(frozen=True)
class Scraped:
    """A server that has answered some requests, and what is known of that.

    Attributes:
        server: A client of it.
        prometheus: A client of what scrapes it.
        before: The server's /metrics,
        after: and when all was answered.
        span: So many seconds lie between.
        ended: When both knew the same again.
    """

    server: httpx.Client
    prometheus: httpx.Client
    before: dict
    after: dict
    span: int
    ended: float

    def ask(self, expression, variables):
        """The samples that Prometheus answers with."""
        text = expression.replace("$__rate_interval", f"{self.span}s")
        query = {"query": choose_all(text, variables), "time": self.ended}
        return vector(answer(self.prometheus, "query", **query))

    def grown(self, name):
        """How far a counter came."""
        return self.after[name] - self.before.get(name, 0)


@pytest.fixture(scope="module")
def scraped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prometheus")
    with serving(MODEL, FLAGS, folder / "server.txt") as server:
        target = f"{server.base_url.host}:{server.base_url.port}"
        with scraping(target, folder) as prometheus:
            before = samples(server)
            wait_until_scraped(prometheus, before)
            began = time.time()
            send_requests(server)
            time.sleep(2)  # statistics lag a little
            after = samples(server)
            time.sleep(20)  # what is extrapolated is little of so long a span
            wait_until_scraped(prometheus, after)
            ended = time.time()
            span = math.ceil(ended - began) + 1
            yield Scraped(server, prometheus, before, after, span, ended)


def send_requests(server):
    model = FLAGS[FLAGS.index("--served-model-name") + 1]
    body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    short, off = {"prompt": [1, 4, 5]}, {"vllm_xargs": {"kv_compression": "off"}}
    for more in ({}, {"prompt": PROMPT[:700]}, {}, short, off):
        reply = server.post("/v1/completions", json={**body, **more})
        assert reply.status_code == 200, reply.text


def wait_until_scraped(prometheus, known):
    """Prometheus knows each of our counters as it stood."""
    names = [n for n in known if re.match(r"vllm:kv_comp.*_total$", str(n))]
    for _ in range(60):
        found = {n: vector(answer(prometheus, "query", query=n)) for n in names}
        sums = {name: sum(each.values()) for name, each in found.items() if each}
        if sums == pytest.approx({name: known[name] for name in names}):
            return
        time.sleep(0.5)
    raise TimeoutError(found)


def vector(data):
    """Values by labels."""
    assert data["resultType"] == "vector"
    return {tuple(r["metric"].items()): float(r["value"][1]) for r in data["result"]}


@pytest.fixture(scope="module")
def variables(scraped):
    """Template variables with all values that Prometheus offers for them."""
    found = {}
    for variable in BOARD["templating"]["list"]:
        if variable["type"] == "query":
            asked = (scraped.prometheus, variable["definition"], found)
            found[variable["name"]] = label_values(*asked)
    return found


def test_variables(variables):
    assert variables == {"model_name": ["ann's [needle] v1.0+"], "engine": ["0"]}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions(scraped, variables, expression):
    found = list(scraped.ask(expression, variables).values())
    assert found
    names = re.findall(r"vllm:\w+", expression)
    if "histogram_quantile" in expression:
        share = float(re.search(r"quantile\((.*?),", expression).group(1))
        lower, upper = bounds(scraped, names[0], share)
        assert [lower < value <= upper for value in found] == [True]
    elif "rate(" not in expression:
        assert sum(found) == scraped.after[names[0]]
    elif "/" in expression:  # both are extrapolated by the same factor
        part, whole = map(scraped.grown, names)
        assert found == [pytest.approx(part / whole)]
    else:
        counted = sum(found) * scraped.span
        assert counted == pytest.approx(scraped.grown(names[0]), rel=EXTRAPOLATED)


def bounds(scraped, name, share):
    """The bucket of a histogram that a quantile lies in."""
    edges = sorted(key[1] for key in scraped.after if key[0] == name)
    counts = [scraped.grown((name, edge)) for edge in edges]
    place = bisect.bisect_left(counts, share * counts[-1])
    return ([0, *edges])[place], edges[place]


def test_what_was_sent_is_what_was_counted(scraped):
    names = ["compressions", "skipped", "logical_tokens", "blocks_freed"]
    grown = [scraped.grown(f"vllm:kv_compression_{name}_total") for name in names]
    # 1,000 tokens are 31 blocks and a tail of 8, and 700 are 21 blocks and one of 28;
    # beside a tail, 7 blocks have room in a budget of 256.
    assert grown == [3, 2, 1000 + 700 + 1000, 2 * (31 - 7) + 21 - 7]


def test_every_reason_has_a_line_of_its_own(scraped, variables):
    (expression,) = [e for e in EXPRESSIONS if "reason" in e]
    found = scraped.ask(expression, variables).items()
    assert {dict(labels)["reason"] for labels, rate in found if rate} == {
        "short",
        "off",
    }


def test_top_agrees(scraped, capsys):
    assert main(["top", str(scraped.server.base_url), "--once", "--json"]) == 0
    total = json.loads(capsys.readouterr().out)["total"]
    for name in ("compressions", "tokens_evicted", "blocks_freed"):
        assert total[name] == scraped.after[f"vllm:kv_compression_{name}_total"]


@pytest.mark.skipif(not shutil.which("promtool"), reason="no `promtool` on PATH")
def test_promtool_finds_vllms_colon_and_nothing_else(scraped):
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=scraped.server.get("/metrics").text,
        text=True,
        capture_output=True,
    )
    said = [line for line in done.stderr.splitlines() if "kv_compression_" in line]
    colon = "metric names should not contain ':'"
    assert {line.partition(" ")[2] for line in said} == {colon}
