"""What check mode alone touches of vLLM's internals, see `compat`."""

from ..compat import Seam

_NEVER = "never: it is what is checked"

SEAMS = (
    Seam(
        "vllm.v1.core.sched.scheduler:Scheduler.finish_requests",
        "overridden: nothing may be left when the last request is aborted",
        _NEVER,
        ("request_ids",),
    ),
    Seam(
        "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue.get_all_free_blocks",
        "called: no block is free twice, or free and held",
        _NEVER,
    ),
    Seam(
        "vllm.v1.core.block_pool:BlockHashToBlockMap",
        "its dict is read: hashes lead to blocks that have them",
        _NEVER,
        attributes=("_cache",),
    ),
    Seam(
        "vllm.v1.core.block_pool:BlockPool.get_new_blocks",
        "wrapped on the object, if blocks are poisoned: what they held is nobody's",
        _NEVER,
        ("num_blocks",),
    ),
    Seam(
        "vllm.v1.core.block_pool:BlockPool.free_blocks",
        "wrapped on the object, if blocks are poisoned: what they hold is nobody's",
        _NEVER,
        ("ordered_blocks",),
    ),
    Seam(
        "vllm.v1.simple_kv_offload.manager:TransferMeta",
        "read: blocks that a KV connector holds",
        _NEVER,
        ("gpu_block_ids",),
    ),
    Seam(
        "vllm.v1.simple_kv_offload.manager:SimpleCPUOffloadScheduler",
        "read: blocks that a KV connector holds",
        _NEVER,
        attributes=(
            *("_pending_finished_stores", "_reqs_to_load", "_abandoned_reqs_to_load"),
            *("_store_event_to_blocks", "_abandoned_store_event_to_blocks"),
        ),
    ),
    Seam(
        "vllm.v1.attention.backend:AttentionMetadataBuilder.build",
        "wrapped on the object: rows, lengths and slots are the scheduler's",
        _NEVER,
        ("common_prefix_len", "common_attn_metadata"),
    ),
)
