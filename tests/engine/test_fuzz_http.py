"""Any request gets an answer or a refusal; what fails also fails stock vLLM."""

import contextlib
import json
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vllm_kvcompress
from tests.engine.served import serving
from vllm_kvcompress.tools.needle import needle_prompts

pytest.importorskip("vllm")
schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1500)]

MODEL = Path(vllm_kvcompress.__file__).parent / "assets" / "needle"
BUDGET = 768
STOCK = [
    *("--dtype", "float32", "--served-model-name", "needle", "--enforce-eager"),
    *("--max-model-len", "2048"),
]
FLAGS = [
    *("--kv-compression", "snapkv", "--kv-compression-config.budget", str(BUDGET)),
    *("--kv-compression-config.request_methods", '["keydiff", "streamingllm"]'),
    *STOCK,
]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ENDPOINTS = [
    *[("POST", path) for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize")],
    *[("GET", path) for path in ("/v1/models", "/metrics", "/health")],
]
PATIENCE = 30  # seconds for one answer
TOKENS = ("max_tokens", "max_completion_tokens", "min_tokens")

fuzzed = settings(
    deadline=None,
    max_examples=150,
    derandomize=True,
    suppress_health_check=[*HealthCheck],
)

names = st.sampled_from(
    [f"kv_compression{end}" for end in ("", "_budget", "_usage")]
    + ["kv_compression_", "kv_compression_budgets", "KV_COMPRESSION", "kv-compression"]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
likely = st.sampled_from(
    ["on", "off", "snapkv", "keydiff", "streamingllm", "random", 47, 64, 256, BUDGET]
    + [BUDGET + 1, 0, -1, 1.0, 256.0, 2**31, 2**63, 2**64, 10**30, "256", "x" * 9999]
)
values = st.recursive(
    scalars | likely,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=4,
)
xargs = st.dictionaries(names, values | likely, max_size=3)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Clients of a server that compresses and of a stock one."""
    folder = tmp_path_factory.mktemp("fuzz")
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(serving(MODEL, flags, folder / f"{name}.txt"))
            for name, flags in (("ours", FLAGS), ("stock", STOCK))
        ]


def sent(client, method, path, content=None, **rest):
    """The status, the text, and whether it is an error of the server's own."""
    answer = client.request(
        method,
        path,
        content=content,
        timeout=PATIENCE,
        **{"headers": {"content-type": "application/json"}, **rest},
    )
    failed = answer.status_code >= 500 or '"code":500' in answer.text
    return answer, failed


def survives(servers, method, path, content=None, **rest):
    """Ours answers or refuses, or stock fails as well."""
    ours, stock = servers
    answer, failed = sent(ours, method, path, content, **rest)
    if failed:
        _, stock_failed = sent(stock, method, path, content, **rest)
        told = f"{method} {path} {content!r}: {answer.status_code} {answer.text}"
        assert stock_failed, told
        print("stock fails too:", told[:500])
    return answer


def shortened(body):
    """The same request for an answer of a few tokens from a model that is there."""
    if not isinstance(body, dict):
        return body
    short = {"model": "needle"} if isinstance(body.get("model"), str) else {}
    for key in TOKENS:
        if isinstance(body.get(key), int):
            short[key] = min(body[key], 3)
    for key in ("n", "best_of"):
        if isinstance(body.get(key), int):
            short[key] = min(body[key], 2)
    return {**body, "max_tokens": 3, **short}


@pytest.mark.parametrize(("method", "path"), ENDPOINTS, ids=" ".join)
def test_requests_by_the_schema(servers, method, path):
    schema = schemathesis.openapi.from_dict(servers[0].get("/openapi.json").json())

    @fuzzed
    @given(schema[path][method].as_strategy())
    def ask(case):
        content = None
        if method == "POST":
            generates = path in (COMPLETIONS, CHAT)
            body = shortened(case.body) if generates else case.body
            content = json.dumps(body)
        survives(servers, method, path, content)

    ask()


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_settings_of_a_request(servers, path):
    words = "abandon " * 900
    prompt = (
        {"prompt": words}
        if path == COMPLETIONS
        else {"messages": [{"role": "user", "content": words}]}
    )

    @fuzzed
    @given(xargs, st.booleans())
    def ask(extra_args, stream):
        body = {"model": "needle", "max_tokens": 2, **prompt, "stream": stream}
        content = json.dumps({**body, "vllm_xargs": extra_args})
        answer = survives(servers, "POST", path, content)
        assert answer.status_code in (200, 400, 500), answer.text
        if answer.status_code == 400:
            told = answer.json()["error"]["message"]
            assert "kv_compression" in told or "vllm_xargs" in told or "2**63" in told

    ask()


def test_it_still_answers_and_holds_nothing(servers):
    asked = needle_prompts(num_tokens=1024, count=1, seed=11)[0]
    body = {"model": "needle", "prompt": asked.token_ids, "temperature": 0}
    answer = servers[0].post(COMPLETIONS, json={**body, "max_tokens": 2})
    assert answer.json()["choices"][0]["text"].split() == asked.answer.split()
    for _ in range(50):
        if usage(servers[0]) == 0:
            break
        time.sleep(0.1)
    assert usage(servers[0]) == 0
    assert servers[0].get("/health").status_code == 200


def usage(client):
    """How full the KV cache is, 0 to 1."""
    for line in client.get("/metrics").text.splitlines():
        if line.startswith("vllm:kv_cache_usage_perc"):
            return float(line.rpartition(" ")[2])
    raise LookupError("vllm:kv_cache_usage_perc")
