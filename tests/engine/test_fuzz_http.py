"""Any request gets an answer or a refusal; what fails also fails stock vLLM."""

import contextlib
import json
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
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
PATIENCE = 30  # seconds for one answer
TOKENS = ("max_tokens", "max_completion_tokens", "min_tokens")

fuzzed = settings(
    deadline=None,
    max_examples=150,
    derandomize=True,
    phases=[Phase.generate],  # no shrinking: it asks for minutes
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
xargs = st.dictionaries(names, likely, max_size=3) | st.dictionaries(
    names, values | st.lists(likely, max_size=3), max_size=3
)
extra_args = st.sampled_from([None, {"kv_compression": "keydiff"}]) | xargs
WORDS = "abandon " * 900
VALID = {
    COMPLETIONS: {"model": "needle", "prompt": WORDS},
    CHAT: {"model": "needle", "messages": [{"role": "user", "content": WORDS}]},
    "/tokenize": {"model": "needle", "prompt": WORDS},
    "/detokenize": {"model": "needle", "tokens": [1, 2, 3]},
}


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Clients of a server that compresses and of a stock one."""
    folder = tmp_path_factory.mktemp("fuzz")
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(serving(MODEL, flags, folder / f"{name}.txt"))
            for name, flags in (("ours", FLAGS), ("stock", STOCK))
        ]


def sent(client, path, body):
    """An answer, and whether it is an error of the server's own."""
    headers = {"content-type": "application/json"}
    answer = client.post(
        path, content=json.dumps(body), headers=headers, timeout=PATIENCE
    )
    return answer, answer.status_code >= 500 or '"code":500' in answer.text


def survives(servers, path, body):
    """Ours answers or refuses, or stock fails as well."""
    answer, failed = sent(servers[0], path, body)
    if failed:
        _, stock_failed = sent(servers[1], path, body)
        assert stock_failed, f"{path} {body}: {answer.status_code} {answer.text}"
        print("Stock fails too:", path, json.dumps(body)[:500], answer.text[:300])
    return answer


def shortened(body):
    """The same request for an answer of a few tokens."""
    most = dict.fromkeys(TOKENS, 3) | {"n": 2, "best_of": 2}
    short = {
        key: min(body[key], most[key])
        for key in body.keys() & most
        if isinstance(body[key], int)
    }
    return {**body, "max_tokens": 3, **short}


@st.composite
def bodies(draw, operation, path):
    """What the schema allows, or a valid request with some of that."""
    drawn = draw(operation.as_strategy()).body
    if not isinstance(drawn, dict):
        return drawn
    generates = path in (COMPLETIONS, CHAT)
    if draw(st.integers(0, 3)) == 0:
        return shortened(drawn) if generates else drawn
    others = sorted(drawn.keys() - VALID[path])
    keys = draw(st.lists(st.sampled_from(others), max_size=2)) if others else []
    body = {**VALID[path], **{key: drawn[key] for key in keys}}
    if generates:
        body = shortened(body) | {"vllm_xargs": draw(extra_args)}
    return body


@pytest.mark.parametrize("path", VALID)
def test_requests_by_the_schema(servers, path):
    schema = schemathesis.openapi.from_dict(servers[0].get("/openapi.json").json())
    served = []

    @fuzzed
    @given(bodies(schema[path]["POST"], path))
    def ask(body):
        answer = survives(servers, path, body)
        served.append(answer.status_code == 200)

    ask()
    assert sum(served) > len(served) / 5  # else it has seen little more than refusals


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_settings_of_a_request(servers, path):
    served = []

    @fuzzed
    @given(xargs, st.booleans())
    def ask(extra_args, stream):
        body = {**VALID[path], "max_tokens": 2, "stream": stream}
        answer = survives(servers, path, {**body, "vllm_xargs": extra_args})
        served.append(answer.status_code == 200)
        if not served[-1]:
            told = answer.json()["error"]["message"]
            assert "kv_compression" in told or "args" in told, told

    ask()
    assert 5 < sum(served) < len(served) - 5


@pytest.mark.parametrize(
    "extra", [{"other": "\ud800"}, {"\ud800": 1}], ids=["value", "key"]
)
def test_what_fails_in_stock_vllm_too(servers, extra):
    """Half a surrogate pair in ``vllm_xargs`` is not UTF-8, as its engine wants it."""
    for client in servers:
        answer, failed = sent(
            client, COMPLETIONS, {**VALID[COMPLETIONS], "vllm_xargs": extra}
        )
        assert failed and answer.status_code == 500


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
    for path in ("/health", "/metrics", "/v1/models"):
        assert servers[0].get(path).status_code == 200


def usage(client):
    """How full the KV cache is, 0 to 1."""
    for line in client.get("/metrics").text.splitlines():
        if line.startswith("vllm:kv_cache_usage_perc"):
            return float(line.rpartition(" ")[2])
    raise LookupError("vllm:kv_cache_usage_perc")
