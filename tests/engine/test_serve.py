"""`vllm serve --kv-compression snapkv`, as a client and an operator see it."""

import json
import time
from pathlib import Path

import pytest

import vllm_kvcompress
from tests.engine.served import serving, vllm
from vllm_kvcompress.tools.main import main

pytest.importorskip("vllm")

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MODEL = Path(vllm_kvcompress.__file__).parent / "assets" / "needle"
BUDGET, BLOCK_SIZE, PROMPT_TOKENS = 256, 32, 1000
PROMPT = [1, *(4 + i % 200 for i in range(PROMPT_TOKENS - 1))]
LONG = {"max_tokens": 60, "ignore_eos": True}
FLAGS = [
    *("--kv-compression", "snapkv", "--kv-compression-config.budget", str(BUDGET)),
    *("--kv-compression-config.request_methods", '["keydiff"]'),
    *("--kv-compression-config.decode", '{"method": "rkv", "interval": 48}'),
    *("--block-size", str(BLOCK_SIZE), "--max-model-len", "2048"),
    *("--dtype", "float32", "--served-model-name", "needle", "--enforce-eager"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A client of one running server."""
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    with serving(MODEL, FLAGS, log) as client:
        yield client


def complete(client, **body):
    body = {"model": "needle", "prompt": PROMPT, "max_tokens": 4, **body}
    return client.post("/v1/completions", json={"temperature": 0, **body})


def chat(client, **body):
    messages = [{"role": "user", "content": "abandon " * 400}]
    body = {"model": "needle", "messages": messages, "max_tokens": 4, **body}
    return client.post("/v1/chat/completions", json={"temperature": 0, **body})


def metrics(client):
    """Samples of /metrics by name, without labels other than the reason."""
    samples = {}
    for line in client.get("/metrics").text.splitlines():
        if line.startswith("vllm:kv_compression_"):
            name, _, rest = line.partition("{")
            labels, _, value = rest.rpartition("} ")
            reason = labels.partition('reason="')[2].partition('"')[0]
            key = f"{name.removeprefix('vllm:kv_compression_')} {reason}".strip()
            samples[key] = (float(value), labels)
    return samples


def counted(client, key, before):
    """How far a counter has come since ``before``; statistics lag a little."""
    for _ in range(50):
        if difference := metrics(client)[key][0] - before[key][0]:
            return difference
        time.sleep(0.1)
    return 0


def wait_for(client, key, before, wanted):
    """A counter comes so far and no further."""
    for _ in range(50):
        if (found := counted(client, key, before)) >= wanted:
            break
        time.sleep(0.1)
    assert found == wanted


def test_counters_are_there_from_the_start(server):
    samples = metrics(server)
    for name in (
        "compressions_total",
        "tokens_evicted_total",
        "blocks_freed_total",
        "logical_tokens_total",
        "retained_tokens_total",
        "seconds_total",
        "skipped_total short",
    ):
        value, labels = samples[name]
        assert value >= 0
        assert 'model_name="needle"' in labels
        assert 'engine="0"' in labels
    value, labels = samples["config_info"]
    assert value == 1
    for label in ('method="snapkv"', f'budget="{BUDGET}"', 'window="32"'):
        assert label in labels


@pytest.mark.parametrize("ask", [complete, chat])
def test_long_prompt_is_compressed(server, ask):
    before = metrics(server)
    answer = ask(server)
    assert answer.status_code == 200, answer.text
    assert counted(server, "compressions_total", before) == 1
    assert counted(server, "blocks_freed_total", before) > 0
    logical = counted(server, "logical_tokens_total", before)
    assert logical == answer.json()["usage"]["prompt_tokens"]
    assert counted(server, "retained_tokens_total", before) <= BUDGET
    assert counted(server, "seconds_total", before) > 0


def test_top_shows_what_metrics_say(server, capsys):
    before = metrics(server)
    complete(server)
    wait_for(server, "compressions_total", before, 1)
    assert main(["top", str(server.base_url), "--once", "--json"]) == 0
    shown, now = json.loads(capsys.readouterr().out), metrics(server)
    assert shown["models"] == ["needle"]
    assert shown["settings"]["budget"] == str(BUDGET)
    assert shown["total"]["compressions"] == now["compressions_total"][0]
    assert shown["total"]["tokens_evicted"] == now["tokens_evicted_total"][0]
    assert 0 < shown["total"]["retained_share"] < 1


def test_parallel_samples(server):
    before = metrics(server)
    answer = complete(server, n=2, temperature=1, seed=0)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == 2
    assert counted(server, "compressions_total", before) >= 1


@pytest.mark.parametrize("ask", [complete, chat])
def test_streaming(server, ask):
    answer = ask(server, stream=True)
    assert answer.status_code == 200
    assert answer.text.rstrip().endswith("data: [DONE]")
    assert "error" not in answer.text


def test_switched_off_for_one_request(server):
    before = metrics(server)
    answer = complete(server, vllm_xargs={"kv_compression": "off"})
    assert answer.status_code == 200, answer.text
    assert counted(server, "skipped_total off", before) == 1
    assert metrics(server)["compressions_total"] == before["compressions_total"]


def respond(client, **body):
    body = {"model": "needle", "input": "abandon " * 400, **body}
    return client.post("/v1/responses", json={"max_output_tokens": 4, **body})


def told(answer):
    """What an answer says of its request's compression."""
    assert answer.status_code == 200, answer.text
    return answer.json()["kv_transfer_params"]["kv_compression"]


@pytest.mark.parametrize("ask", [complete, chat, respond])
def test_a_request_is_told_what_was_kept(server, ask):
    before = metrics(server)
    answer = ask(server, vllm_xargs={"kv_compression_usage": True})
    found = told(answer)
    logical = answer.json()["usage"]["total_tokens"] - 1
    evicted = counted(server, "tokens_evicted_total", before)
    assert evicted > 0
    assert found == {
        "method": "snapkv",
        "skipped": None,
        "waited": 0,
        "compressions": 1,
        "blocks_freed": counted(server, "blocks_freed_total", before),
        "logical_tokens": logical,
        "retained_tokens": logical - evicted,
        "retained_by_layer": None,
    }
    for nobody in ({}, {"vllm_xargs": {"kv_compression_usage": False}}):
        assert ask(server, **nobody).json()["kv_transfer_params"] is None


@pytest.mark.parametrize(
    ("xargs", "body", "skipped", "method"),
    [
        ({"kv_compression": "off"}, {}, "off", None),
        ({}, {"prompt": [1, 4, 5]}, "short", "snapkv"),
        ({}, {"max_tokens": 1}, "one_token", "snapkv"),
    ],
    ids=["off", "short", "one_token"],
)
def test_a_request_is_told_why_nothing_went(server, xargs, body, skipped, method):
    asked = {**xargs, "kv_compression_usage": True}
    found = told(complete(server, vllm_xargs=asked, **body))
    assert (found["skipped"], found["method"]) == (skipped, method)
    assert found["compressions"] == found["blocks_freed"] == 0
    assert found["retained_tokens"] == found["logical_tokens"] > 0


def test_a_request_that_ends_by_a_word_is_told(server):
    """The engine does not know of such an end; only the front end does."""
    asked = {"vllm_xargs": {"kv_compression_usage": True}, **LONG}
    whole = complete(server, **asked)
    (choice,) = whole.json()["choices"]
    word = choice["text"].split()[1]
    ended = complete(server, stop=[word], **asked)
    (choice,) = ended.json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", word)
    # The prompt, and 48 tokens behind it.
    assert told(whole)["compressions"] == 2
    assert told(ended)["compressions"] == 1
    assert told(ended)["logical_tokens"] < told(whole)["logical_tokens"]


def test_one_of_parallel_samples_is_told_of(server):
    asked = {"vllm_xargs": {"kv_compression_usage": True}, **LONG}
    found = told(complete(server, n=2, temperature=1, seed=0, **asked))
    assert found["compressions"] == 2
    assert found["logical_tokens"] == PROMPT_TOKENS + 59


@pytest.mark.parametrize("ask", [complete, chat])
def test_streams_take_the_question(server, ask):
    """vLLM's chunks have no room for the answer."""
    answer = ask(server, stream=True, vllm_xargs={"kv_compression_usage": True})
    assert answer.status_code == 200
    assert answer.text.rstrip().endswith("data: [DONE]")


def test_lower_budget_for_one_request(server):
    before = metrics(server)
    answer = complete(server, vllm_xargs={"kv_compression_budget": 96})
    assert answer.status_code == 200, answer.text
    assert counted(server, "compressions_total", before) == 1
    assert counted(server, "retained_tokens_total", before) <= 96


def test_a_request_chooses_its_method(server):
    before = metrics(server)
    firsts, seconds = [], []
    for method in ("snapkv", "keydiff"):
        answer = complete(server, vllm_xargs={"kv_compression": method}, logprobs=5)
        assert answer.status_code == 200, answer.text
        first, second, *_ = answer.json()["choices"][0]["logprobs"]["top_logprobs"]
        firsts.append(first)
        seconds.append(second)
    wait_for(server, "compressions_total", before, 2)
    # The first token sees the whole prompt, the next one what is left of it.
    assert firsts[0] == pytest.approx(firsts[1], abs=1e-3)
    assert seconds[0] != pytest.approx(seconds[1], abs=1e-2)


@pytest.mark.parametrize("n", [1, 2])
def test_long_answers_are_compressed_again_and_streamed(server, n):
    before = metrics(server)
    body = {"max_tokens": 120, "ignore_eos": True, "n": n, "temperature": 1, "seed": 0}
    whole = complete(server, **body)
    assert whole.status_code == 200, whole.text
    # The prompt, and 48 and 96 tokens behind it.
    wait_for(server, "compressions_total", before, 3 * n)
    streamed = [""] * n
    for line in complete(server, **body, stream=True).text.splitlines():
        if line.startswith("data: {"):
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            streamed[choice["index"]] += choice["text"]
    assert streamed == [choice["text"] for choice in whole.json()["choices"]]
    assert all(streamed)
    wait_for(server, "compressions_total", before, 6 * n)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", [complete, chat])
@pytest.mark.parametrize(
    ("xargs", "told"),
    [
        ({"kv_compression": "nope"}, ["kv_compression='nope'", "'off'", "'snapkv'"]),
        ({"kv_compression": "tova"}, ["kv_compression='tova'", "'keydiff'"]),
        ({"kv_compression_budget": BUDGET + 1}, [f"={BUDGET + 1}", f"63 to {BUDGET}"]),
        ({"kv_compression_budget": 5}, ["=5", f"63 to {BUDGET}"]),
        ({"kv_compression_budget": "many"}, ["='many'", "whole numbers"]),
        ({"kv_compression_budget": {"a": 1}}, ["kv_compression_budget"]),
        ({"kv_compression_usage": "yes"}, ["_usage='yes'", "true and false"]),
        ({"kv_compression_window": 8}, ["kv_compression_window"]),
    ],
    ids=str,
)
def test_bad_request_is_400_and_the_server_lives_on(server, ask, xargs, told, stream):
    answer = ask(server, vllm_xargs=xargs, stream=stream)
    assert answer.status_code == 400, answer.text
    message = json.loads(answer.text)["error"]["message"]
    for part in told:
        assert part in message
    assert complete(server, prompt=[1, 4, 5]).status_code == 200


def test_log_line(server):
    complete(server)
    for _ in range(150):
        if "KV compressions: " in server.log.read_text():
            return
        time.sleep(0.1)
    pytest.fail(server.log.read_text())


def test_help():
    done = vllm("serve", "--help=KVCompression")
    assert done.returncode == 0, done.stderr
    for part in ("--kv-compression METHOD", "budget", "keep_ratio", "window (snapkv)"):
        assert part in done.stdout


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--kv-compression", "nope"], "invalid choice: 'nope'"),
        (
            ["--kv-compression", "snapkv", "--kv-compression-config.budget", "x"],
            "budget='x' should be a valid integer",
        ),
    ],
    ids=str,
)
def test_bad_flag_ends_with_one_sentence(flags, told):
    done = vllm("serve", str(MODEL), *flags)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert told in done.stderr.strip().splitlines()[-1]


def test_eval_asks_the_same_server_with_and_without(server, tmp_path, capsys):
    asked = [
        *("eval", "--url", str(server.base_url), "--out", str(tmp_path)),
        *("--tasks", "needle", "--lengths", "1000", "--samples", "3"),
        *("--methods", "keydiff"),
    ]
    assert main([*asked, "--budgets", "128"]) == 0
    arms = {}
    for folder in tmp_path.iterdir():
        config = json.loads((folder / "config.json").read_text())
        assert config["target"] == "url" and config["fidelity"] == "prefix"
        arms[config["label"]] = json.loads((folder / "metrics.json").read_text())
    stock, keydiff = arms["stock"], arms["keydiff budget=128"]
    assert stock["accuracy"] == 1 and stock["kv"]["compressions"] == 0
    assert keydiff["kv"]["compressions"] == 3
    assert keydiff["kv"]["kept_share"] == pytest.approx(0.1, abs=0.03)
    assert keydiff["fidelity"]["agreement"] < 1
    # Where the first token differs, one position is all there is.
    assert 3 <= keydiff["fidelity"]["tokens"] < 12

    capsys.readouterr()
    assert main([*asked, "--question", "outside"]) == 1
    text = capsys.readouterr().err
    assert "start http" in text and "--logits-processors vllm_kvcompress." in text
    assert text.count("\n") == 1
