"""Trained models that share KV, through `vllm serve` and `LLM`: the right answers."""

from pathlib import Path

import pytest

import vllm_kvcompress
from tests.engine.conftest import engine
from tests.engine.served import serving, vllm
from vllm_kvcompress.tools.needle import accuracy, needle_prompts

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MODELS = Path(__file__).parents[1] / "models"
NEEDLE = Path(vllm_kvcompress.__file__).parent / "assets" / "needle"
PROMPTS = needle_prompts(num_tokens=1024, count=40, seed=11)
SNAPKV = {"method": "snapkv", "budget": 256, "window": 16}


def _answered(llm):
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": prompt.token_ids} for prompt in PROMPTS]
    params = SamplingParams(max_tokens=2, temperature=0.0)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return accuracy(PROMPTS, [output.outputs[0].token_ids for output in outputs])


@pytest.mark.parametrize("name", ["cla", "lckv", "yoco"])
def test_answers(name):
    with engine(MODELS / name, kv_compression=name, enforce_eager=False) as llm:
        assert _answered(llm) >= 0.95
        found = vllm_kvcompress.stats(llm)
        assert 0 < found["kv_layers"] < found["layers"]


@pytest.mark.parametrize("name", ["cla", "lckv", "yoco"])
def test_answers_from_what_snapkv_keeps(name):
    config = {"kv_compression": SNAPKV}
    with engine(MODELS / name, additional_config=config) as llm:
        assert _answered(llm) >= 0.95
        assert vllm_kvcompress.stats(llm)["tokens_evicted"] >= 40 * 700


def test_serve(tmp_path):
    flags = ["--dtype", "float32", "--max-model-len", "2048", "--enforce-eager"]
    with serving(MODELS / "yoco", flags, tmp_path / "log.txt") as client:
        body = {"model": str(MODELS / "yoco"), "temperature": 0, "max_tokens": 2}
        asked = {**body, "prompt": PROMPTS[0].token_ids}
        answer = client.post("/v1/completions", json=asked)
        assert answer.json()["choices"][0]["text"].split() == PROMPTS[0].answer.split()
        for extra in ({"prompt_logprobs": 1}, {"echo": True, "logprobs": 1}):
            refused = client.post("/v1/completions", json={**asked, **extra})
            assert refused.status_code == 400
            assert "early_exit" in refused.json()["error"]["message"]
        assert client.post("/v1/completions", json=asked).json() is not None
        assert "stores KV in 1 of 4 layers" in client.log.read_text()


def test_another_model_is_refused():
    done = vllm("serve", str(NEEDLE), "--kv-compression", "lckv")
    assert done.returncode != 0
    assert "kv_compression=lckv needs a model that is built so" in done.stderr
