"""What we read and set of objects of vLLM that are not ours."""

from .seam import V1, V2, Seam

_PLUGINS = "vLLM names what plugins may read"
_ATTENTION = "vllm.model_executor.layers.attention"
_BACKEND = "vllm.v1.attention.backend:"
_CORE = "vllm.v1.core."


def _holds(target: str, *attributes: str, why: str = "read") -> Seam:
    return Seam(target, why, _PLUGINS, attributes=attributes)


OBJECTS = (
    _holds(
        "vllm.engine.arg_utils:EngineArgs",
        *("additional_config", "enable_prefix_caching"),
        why="read; takes our keywords",
    ),
    # The scheduler's.
    _holds(
        _CORE + "sched.scheduler:Scheduler",
        *("vllm_config", "scheduler_config", "kv_cache_config", "kv_cache_manager"),
        *("requests", "max_model_len", "num_spec_tokens"),
    ),
    _holds(_CORE + "kv_cache_manager:KVCacheManager", "coordinator", "block_pool"),
    _holds(_CORE + "kv_cache_coordinator:KVCacheCoordinator", "single_type_managers"),
    _holds(
        _CORE + "single_type_kv_cache_manager:FullAttentionManager",
        *("block_pool", "block_size", "kv_cache_spec", "req_to_blocks", "_null_block"),
        why="read; a compressed request's entries are set",
    ),
    _holds(
        _CORE + "block_pool:BlockPool",
        *("get_num_free_blocks", "get_new_blocks", "free_blocks"),
        why="called: private blocks are taken, originals are given back",
    ),
    _holds(_CORE + "kv_cache_utils:KVCacheBlock", "block_id", "block_hash", "ref_cnt"),
    _holds(
        _CORE + "sched.output:SchedulerOutput",
        *("num_scheduled_tokens", "scheduled_cached_reqs"),
        *("finished_req_ids", "preempted_req_ids"),
    ),
    _holds(_CORE + "sched.output:CachedRequestData", "resumed_req_ids"),
    _holds(
        "vllm.v1.request:Request",
        *("request_id", "sampling_params", "status", "is_finished", "resumable"),
        *("num_tokens", "num_prompt_tokens", "num_computed_tokens", "num_preemptions"),
    ),
    # The worker's.
    _holds(V1, "attn_groups", "kv_cache_config", "input_batch", "requests"),
    _holds(
        "vllm.v1.worker.gpu_input_batch:InputBatch",
        *("req_ids", "req_id_to_index", "block_table"),
    ),
    _holds(V2, "attn_groups", "kv_cache_config", "req_states", "block_tables"),
    _holds("vllm.v1.worker.gpu.states:RequestState", "req_id_to_index"),
    _holds("vllm.v1.worker.gpu.block_table:BlockTables", "block_tables"),
    _holds(
        "vllm.v1.worker.gpu.input_batch:InputBatch", "req_ids", "num_scheduled_tokens"
    ),
    _holds(
        "vllm.v1.kv_cache_interface:KVCacheGroupSpec", "layer_names", "kv_cache_spec"
    ),
    _holds(
        "vllm.v1.kv_cache_interface:FullAttentionSpec",
        *("max_memory_usage_bytes", "merge", "is_uniform_with_collection"),
        why="overridden: layers of a tier are one KV cache group",
    ),
    _holds(
        _BACKEND + "CommonAttentionMetadata",
        *("block_table_tensor", "slot_mapping", "seq_lens", "query_start_loc"),
        *("seq_lens_cpu_upper_bound", "query_start_loc_cpu", "req_idx", "num_reqs"),
        *("max_seq_len", "max_query_len", "_num_computed_tokens_cache", "replace"),
        why="read; replaced by that of shorter rows",
    ),
    _holds(
        "vllm.forward_context:ForwardContext",
        *("attn_metadata", "slot_mapping", "skip_compiled", "cudagraph_runtime_mode"),
    ),
    _holds(
        _ATTENTION + ":Attention",
        *("layer_name", "impl", "attn_backend", "kv_cache", "kv_cache_dtype"),
        *("kv_sharing_target_layer_name", "has_sink", "head_size_v", "query_quant"),
    ),
    _holds(
        _ATTENTION + ".attention:set_default_quant_scales",
        *("_q_scale", "_k_scale_float", "_v_scale_float"),
    ),
    _holds(
        "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl",
        *("scale", "logits_soft_cap", "_kv_quant_mode", "_is_per_token_head_quant"),
        *("_k_scale_cache", "_v_scale_cache"),
        why="read; set on a copy",
    ),
    _holds(
        "vllm.v1.attention.backends.triton_attn:TritonAttentionMetadataBuilder",
        *("seq_threshold_3D", "max_seqs_64_segments"),
        why="read: a head of a page counts as a sequence",
    ),
    # The server's.
    _holds("vllm.v1.metrics.loggers:StatLoggerManager", "stat_loggers"),
    _holds(
        "vllm.v1.metrics.loggers:PrometheusStatLogger",
        *("per_engine_labelvalues", "_counter_cls", "_gauge_cls"),
        why="read: our metrics are registered as its own are",
    ),
)
