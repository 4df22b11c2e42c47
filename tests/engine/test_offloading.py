"""KV offloading with compression: vLLM's connector over copies that take their time.

Copies are those of `offload_harness`; check mode poisons whatever nobody may read.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from tests.engine import offload_harness
from tests.engine.conftest import Answer, engine, generate, preemptions, scheduler
from tests.engine.offload_harness import drain, forget, held, stored, tight
from tests.engine.serving import ENGINE, SERVERS, Request, ask, requests
from vllm_kvcompress import stats
from vllm_kvcompress.engine.check.switch import VARIABLE

# More blocks, where some would wait for private ones, and be compressed late.
MORE = {"ada_snapkv": 60, "minicache": 60}

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def copies() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "poison")
        offload_harness.boot(patch)
        yield


@pytest.fixture(scope="module", params=SERVERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def asked(name: str) -> list[Request]:
    return requests(SERVERS[name])


def start(model: Path, name: str, **kwargs: Any) -> Any:
    config = {"kv_compression": SERVERS[name]}
    return engine(model, additional_config=config, **{**ENGINE, **kwargs})


@pytest.fixture(scope="module")
def plain(copies: None, llama: Path, name: str, asked: list[Request]) -> list[Answer]:
    """What a server answers that does not offload."""
    with start(llama, name) as e:
        return ask(e, asked)


@pytest.fixture(scope="module")
def llm(llama: Path, name: str, plain: list[Answer]) -> Iterator[Any]:
    transfer = offload_harness.transfer_config()
    with start(llama, name, kv_transfer_config=transfer) as e:
        yield e


@pytest.fixture(scope="module")
def exact(llm: Any, asked: list[Request], plain: list[Answer]) -> dict[Any, Any]:
    """Every block that may be stored, by its hash: nothing of it is compressed."""
    whole = [
        [*request.tokens, *([] if request.compressions else answer.tokens)]
        for request, answer in zip(asked, plain, strict=True)
    ]
    forget(llm)
    generate(llm, whole, 1)
    found = dict(held(llm))
    forget(llm)
    return found


@pytest.fixture
def clean(exact: Any, llm: Any) -> Iterator[None]:
    """Start with nothing cached, and end with every stored block right."""
    forget(llm)
    yield
    drain(llm)
    for key, mine in stored(llm):
        for own, theirs in zip(mine, exact[key], strict=True):
            assert torch.allclose(own, theirs, atol=2e-4)


def check(asked: list[Request], found: list[Answer], plain: list[Answer]) -> None:
    for request, mine, theirs in zip(asked, found, plain, strict=True):
        assert mine.near(theirs), (request.method, request.length)


@pytest.mark.usefixtures("clean")
def test_what_was_stored_is_loaded(
    llm: Any, asked: list[Request], plain: list[Answer]
) -> None:
    check(asked, ask(llm, asked), plain)
    drain(llm)
    assert scheduler(llm).reset_prefix_cache()
    found = ask(llm, asked)
    assert [answer.cached for answer in found] == [request.hits for request in asked]
    check(asked, found, plain)


@pytest.mark.usefixtures("clean")
def test_little_space(
    llm: Any, name: str, asked: list[Request], plain: list[Answer]
) -> None:
    """What is emptied is stored, though others wait for the blocks."""
    preempted, skipped = preemptions(llm), dict(stats(llm)["skipped"])
    with tight(llm, asked, MORE.get(name, 0)):
        check(asked, ask(llm, asked), plain)
        check(asked, ask(llm, asked), plain)
    assert preempted or name in MORE
    assert stats(llm)["skipped"].get("pool_dry") == skipped.get("pool_dry")


@pytest.mark.usefixtures("clean")
def test_aborts(llm: Any, asked: list[Request], plain: list[Answer]) -> None:
    """Who leaves while its blocks are stored or loaded leaves nothing behind."""
    for number in range(2):
        params = [
            SamplingParams(
                max_tokens=8, temperature=0, detokenize=False, **request.params
            )
            for request in asked
        ]
        names = [
            llm.llm_engine.add_request(
                str(i), {"prompt_token_ids": request.tokens}, own
            )
            for i, (request, own) in enumerate(zip(asked, params, strict=True))
        ]
        for name in names:
            llm.llm_engine.step()
            llm.llm_engine.abort_request([name], internal=True)
        drain(llm)
        assert scheduler(llm).reset_prefix_cache() or number
    check(asked, ask(llm, asked), plain)


@pytest.mark.usefixtures("clean")
def test_reset_while_copies_are_under_way(
    llm: Any, asked: list[Request], plain: list[Answer]
) -> None:
    ask(llm, asked[-1:])
    scheduler(llm).reset_prefix_cache(reset_connector=True)
    check(asked, ask(llm, asked), plain)
