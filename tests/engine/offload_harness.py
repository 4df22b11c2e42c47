"""vLLM's KV offloading without a GPU: plain copies, which end later than they begin.

A test harness. Scheduler, connector and worker are vLLM's own; only the class that
copies blocks by CUDA is replaced, at its own interface. A store reads its blocks when
it is found to be done, so it notices whoever touches them before; a load writes its
own at once, so that whoever still reads them notices.
"""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.engine.conftest import scheduler
from tests.engine.serving import Request, little_space

EXTRA = {"cpu_bytes_to_use": 64 * 2**20}
DELAY = 4  # steps that a copy takes


def transfer_config(**extra: Any) -> dict[str, Any]:
    """Of an engine that offloads, as ``--kv-offloading-size`` makes it."""
    return {
        "kv_connector": "SimpleCPUOffloadConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {**EXTRA, **extra},
    }


class _Stream:
    """A stream; `CopyBackend` needs none."""

    def __init__(self, priority: int = 0) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, -1


class _Event:
    """A copy that is done after some looks at it."""

    def __init__(self, copy: Any = None) -> None:
        self._copy, self._left = copy, DELAY

    def record(self, *args: Any) -> None:
        pass

    def query(self) -> bool:
        self._left -= 1
        if self._left <= 0:
            self.synchronize()
        return self._left <= 0

    def synchronize(self) -> None:
        copy, self._copy = self._copy, None
        if copy is not None:
            copy()
        self._left = 0


class CopyBackend:
    """What ``DmaCopyBackend`` does, in plain torch."""

    def init(self, gpu: Any, cpu: Any, *args: Any) -> None:
        self._caches = [(gpu[name], cpu[name]) for name in gpu]

    def launch_copy(
        self,
        src_blocks: list[int],
        dst_blocks: list[int],
        is_store: bool,
        event_idx: int,
        events_list: list[Any],
        wait_event: Any = None,
    ) -> None:
        def copy() -> None:
            for gpu, cpu in self._caches:
                source, target = (gpu, cpu) if is_store else (cpu, gpu)
                target[dst_blocks] = source[src_blocks]

        if not is_store:
            copy()
        events_list.append((event_idx, _Event(copy if is_store else None)))

    def shutdown(self) -> None:
        pass


def boot(patch: pytest.MonkeyPatch) -> None:
    """Let engines made from now on offload from a CPU's memory to elsewhere in it."""
    from vllm.v1.simple_kv_offload import worker

    from vllm_kvcompress.engine import connectors

    cuda = types.SimpleNamespace(Stream=_Stream, current_stream=_Stream)
    with_streams = types.SimpleNamespace(**{**vars(torch), "cuda": cuda})
    with_streams.Event = _Event
    patch.setattr(worker, "torch", with_streams)
    patch.setattr(worker, "DmaCopyBackend", CopyBackend)
    device = types.SimpleNamespace(is_cpu=lambda: False)
    patch.setattr(connectors, "current_platform", device)


def worker() -> Any:
    """The worker's half of vLLM's connector."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().worker_handler


def cached(pool: Any, memory: dict[str, torch.Tensor]) -> Iterator[tuple[Any, Any]]:
    """Hashes of a pool's blocks, each with what lies there, by layer."""
    for key, found in pool.cached_block_hash_to_block._cache.items():
        for block in found.values() if isinstance(found, dict) else [found]:
            content = [cache[block.block_id] for cache in memory.values()]
            yield key, [own.clone().view(torch.float32) for own in content]


def stored(llm: Any) -> list[tuple[Any, Any]]:
    """What is cached in the CPU's memory, see `cached`."""
    pool = scheduler(llm).connector.scheduler_manager.cpu_block_pool
    return list(cached(pool, worker().cpu_kv_caches))


def held(llm: Any) -> list[tuple[Any, Any]]:
    """What is cached where requests run, see `cached`."""
    pool = scheduler(llm).kv_cache_manager.block_pool
    return list(cached(pool, worker().gpu_kv_caches))


def drain(llm: Any) -> None:
    """Let copies end that are under way."""
    for _ in range(3 * DELAY):
        llm.llm_engine.step()
    assert not scheduler(llm).has_requests()


def forget(llm: Any) -> None:
    """Empty the caches of both memories."""
    drain(llm)
    assert scheduler(llm).reset_prefix_cache(reset_connector=True)
    assert not stored(llm)


@contextlib.contextmanager
def tight(llm: Any, asked: list[Request], more: int = 0) -> Iterator[None]:
    """Little space, whose other blocks vLLM seems to keep for steps under way."""
    deferred = scheduler(llm).deferred_frees
    with little_space(llm, asked, more):
        pool = scheduler(llm).kv_cache_manager.block_pool
        deferred.append((2**62, [b for b in pool.blocks[1:] if b.ref_cnt]))
        try:
            yield
        finally:
            deferred.clear()
