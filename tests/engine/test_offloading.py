"""KV offloading with compression: vLLM's connector over copies that take their time.

Copies are those of `offload_harness`; check mode poisons whatever nobody may read.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import offload_harness
from tests.engine.conftest import Answer, engine, generate, preemptions, scheduler
from tests.engine.serving import ENGINE, SERVERS, Request, ask, little_space, requests
from vllm_kvcompress.engine.check.switch import VARIABLE

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
def plain(
    copies: None, llama: Path, name: str, asked: list[Request]
) -> list[Answer]:
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
    pool = scheduler(llm).kv_cache_manager.block_pool
    found = {
        key: gpu_bytes(llm, block.block_id)
        for key, block in pool.cached_block_hash_to_block._cache.items()
    }
    forget(llm)
    return found


def offloader(llm: Any) -> Any:
    """The scheduler's half of vLLM's connector."""
    return scheduler(llm).connector.scheduler_manager


def _worker(llm: Any) -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().worker_handler


def gpu_bytes(llm: Any, block: int) -> list[torch.Tensor]:
    caches = _worker(llm).gpu_kv_caches.values()
    return [cache[block].clone().view(torch.float32) for cache in caches]


def stored(llm: Any) -> dict[Any, list[torch.Tensor]]:
    """What lies in the CPU's memory, by its hash."""
    caches = list(_worker(llm).cpu_kv_caches.values())
    found = offloader(llm).cpu_block_pool.cached_block_hash_to_block._cache
    return {
        key: [cache[block.block_id].view(torch.float32) for cache in caches]
        for key, block in found.items()
    }


def drain(llm: Any) -> None:
    """Let copies end that are under way."""
    while scheduler(llm).has_requests():
        llm.llm_engine.step()


def forget(llm: Any) -> None:
    """Empty the caches of both memories."""
    drain(llm)
    assert scheduler(llm).reset_prefix_cache(reset_connector=True)
    assert not stored(llm)


@pytest.fixture(autouse=True)
def _clean(exact: Any, llm: Any) -> Iterator[None]:
    """Start with nothing cached, and end with every stored block right."""
    forget(llm)
    yield
    drain(llm)
    for key, mine in stored(llm).items():
        for own, theirs in zip(mine, exact[key], strict=True):
            assert torch.allclose(own, theirs, atol=2e-4)


def check(asked: list[Request], found: list[Answer], plain: list[Answer]) -> None:
    for request, mine, theirs in zip(asked, found, plain, strict=True):
        assert mine.near(theirs), (request.method, request.length)


def test_what_was_stored_is_loaded(
    llm: Any, asked: list[Request], plain: list[Answer]
) -> None:
    check(asked, ask(llm, asked), plain)
    drain(llm)
    assert scheduler(llm).reset_prefix_cache()
    found = ask(llm, asked)
    assert [answer.cached for answer in found] == [request.hits for request in asked]
    check(asked, found, plain)


def test_little_space(llm: Any, asked: list[Request], plain: list[Answer]) -> None:
    preempted = preemptions(llm)
    with little_space(llm, asked):
        check(asked, ask(llm, asked), plain)
        print("STORED", len(stored(llm)))
        check(asked, ask(llm, asked), plain)
    assert preempted
