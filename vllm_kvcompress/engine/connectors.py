"""KV offloading beside compression: which of vLLM's connectors, and what it may load.

A compressed request gives blocks back while it runs. `SimpleCPUOffloadConnector` stores
a block under the hash that the block has at that moment, and holds a reference until
it is copied; so it stores whole, exact blocks only, however their owners come and go.
All others remember block numbers by request, and would read what came after.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.request import Request, RequestStatus

logger = init_logger("vllm.plugins.kv_compression")

SUPPORTED = "SimpleCPUOffloadConnector"
_NATIVE = "OffloadingConnector"


def choose_connector(vllm_config: VllmConfig) -> None:
    """Let ``--kv-offloading-size`` use the one of vLLM's two that can be used."""
    cache, transfer = vllm_config.cache_config, vllm_config.kv_transfer_config
    native = cache.kv_offloading_size and cache.kv_offloading_backend == "native"
    if native and transfer is not None and transfer.kv_connector == _NATIVE:
        logger.info("KV compression offloads KV blocks by vLLM's %s.", SUPPORTED)
        transfer.kv_connector = SUPPORTED


def connector_refusals(vllm_config: VllmConfig) -> list[tuple[bool, str, str]]:
    """Whether, which setting in use is not supported, and the way out."""
    transfer = vllm_config.kv_transfer_config
    name = transfer.kv_connector if transfer else None
    own = transfer is not None and transfer.kv_connector_module_path is not None
    return [
        (
            name is not None and (own or name != SUPPORTED),
            f"the KV connector {name}",
            f"use {SUPPORTED}, which --kv-offloading-size N chooses by itself, or drop "
            "--kv-transfer-config and --kv-offloading-backend",
        ),
        (
            name == SUPPORTED and current_platform.is_cpu(),
            "KV offloading on CPUs, whose KV blocks lie in their memory anyway",
            "drop --kv-offloading-size and --kv-transfer-config",
        ),
    ]


def bound_loads(connector: Any, limit: Callable[[Request], int | None]) -> None:
    """Let what is loaded leave the queries of windows to compute, as cache hits do.

    The search is bounded, not what it finds: behind a sliding window, blocks are found
    for hits of one length only.

    Args:
        connector: The scheduler's.
        limit: How many tokens of a request need not be computed, None = all.
    """
    if connector.scheduler_manager is None:
        return  # without prefix caching it does nothing
    coordinator = connector.scheduler_manager.cpu_coordinator
    room: int | None = None
    ask, find = connector.get_num_new_matched_tokens, coordinator.find_longest_cache_hit

    def find_longest_cache_hit(hashes: Any, max_length: int) -> Any:
        return find(hashes, max_length if room is None else min(max_length, room))

    def get_num_new_matched_tokens(
        request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        nonlocal room
        most = limit(request)
        room = None if most is None else most - num_computed_tokens
        if room is not None and room <= 0:
            return 0, False
        return ask(request, num_computed_tokens)  # type: ignore[no-any-return]

    coordinator.find_longest_cache_hit = find_longest_cache_hit
    connector.get_num_new_matched_tokens = get_num_new_matched_tokens


def hold_emptied(scheduler: Any, give_back: Callable[[], int]) -> None:
    """Keep emptied blocks for the connector to store, unless a request would starve.

    Args:
        scheduler: It gives them back itself when its connector has seen them.
        give_back: Does so at once, and says how many there were.
    """
    manager = scheduler.kv_cache_manager
    allocate = manager.allocate_slots

    def allocate_slots(request: Request, *args: Any, **kwargs: Any) -> Any:
        found = allocate(request, *args, **kwargs)
        if found is None and request.status == RequestStatus.RUNNING and give_back():
            found = allocate(request, *args, **kwargs)
        return found

    manager.allocate_slots = allocate_slots


def await_step(scheduler_output: Any, device: torch.device) -> None:
    """Wait for the last step's compression where blocks that it read may be filled.

    Loads are not ordered behind it on the device.
    """
    metadata = scheduler_output.kv_connector_metadata
    if getattr(metadata, "load_gpu_blocks", None) and device.type != "cpu":
        torch.accelerator.current_stream(device).synchronize()
