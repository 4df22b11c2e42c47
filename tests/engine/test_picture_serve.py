"""A picture in a chat request, as clients send it: as a data: URL."""

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.pictures import words
from tests.engine.served import serving
from tests.engine.test_serve import counted, metrics
from tests.picture_models import FAMILIES, picture, write
from tests.sighted import Sighted

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]

FAMILY, LENGTH, COUNT = "idefics3", 400, 8
TEXT = words(LENGTH)
FLAGS = [
    *("--kv-compression", "snapkv", "--kv-compression-config.budget", "128"),
    *("--kv-compression-config.window", "16", "--block-size", "32"),
    *("--max-model-len", "1024", "--dtype", "float32", "--enforce-eager"),
    *("--served-model-name", "sighted", "--limit-mm-per-prompt", '{"image": 1}'),
    # Pictures come first, then words.
    *("--chat-template", "{{ messages[0]['content'] }}"),
    *("--chat-template-content-format", "string"),
]


@pytest.fixture(scope="module")
def folder(saved: Callable[[str], Path]) -> Path:
    return saved(FAMILY)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with serving(folder, FLAGS, tmp_path_factory.mktemp("serve") / "log") as client:
        yield client


def chat(client: Any, seed: int, **body: Any) -> dict[str, Any]:
    """The answer to a picture and many words."""
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": " ".join(f"<{word}>" for word in TEXT)},
    ]
    answer = client.post(
        "/v1/chat/completions",
        json={
            "model": "sighted",
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": COUNT,
            "ignore_eos": True,
            "logprobs": True,
            "return_token_ids": True,
            **body,
        },
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def found(answer: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Tokens and their log-probabilities."""
    choice = answer["choices"][0]
    rows = [token["logprob"] for token in choice["logprobs"]["content"]]
    return choice["token_ids"], rows


@pytest.mark.parametrize("seed", [1, 2])
def test_a_picture_is_seen_and_compressed(server: Any, folder: Path, seed: int) -> None:
    before = metrics(server)
    answer = chat(server, seed)
    prompt = write(FAMILIES[FAMILY], picture(seed), TEXT)
    assert answer["prompt_token_ids"] == prompt.tokens
    assert counted(server, "compressions_total", before) == 1
    assert counted(server, "logical_tokens_total", before) == len(prompt.tokens)
    assert counted(server, "retained_tokens_total", before) <= 128
    tokens, rows = found(answer)
    model = Sighted(folder)
    expected = model.answer(prompt, tokens[:1])[0, tokens[0]]
    assert rows[0] == pytest.approx(float(expected), abs=5e-4)
    whole = chat(server, seed, vllm_xargs={"kv_compression": "off"})
    tokens, rows = found(whole)
    dense = model.answer(prompt, tokens)
    for row, token, own in zip(dense, tokens, rows, strict=True):
        assert int(row.argmax()) == token
        assert own == pytest.approx(float(row[token]), abs=5e-4)
