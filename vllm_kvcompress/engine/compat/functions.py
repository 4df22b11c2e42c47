"""Functions of vLLM that we override, wrap, replace or call, and why."""

from .seam import V1, V2, Seam

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler."
_TRITON = "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl."
_PLAN = "vLLM has a channel for plugins from scheduler to workers"
_FIELDS = "EngineArgs lets plugins add fields"
_HOOKS = "vLLM's runners call hooks around a step"
_LAYER = "customize_spec learns of the layer"
_HEADS = "an attention layer knows which of all KV heads it holds"

FUNCTIONS = (
    Seam(
        "vllm.engine.arg_utils:EngineArgs.add_cli_args",
        "wrapped: adds the flags",
        _FIELDS,
        ("parser",),
    ),
    Seam(
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        "wrapped: switches compression on in a finished configuration",
        _FIELDS,
    ),
    Seam(
        _SCHEDULER + "schedule",
        "overridden: attaches the plan to its output",
        _PLAN,
    ),
    Seam(
        _SCHEDULER + "update_from_output",
        "overridden: reads the workers' report",
        _PLAN,
        ("scheduler_output", "model_runner_output"),
    ),
    Seam(
        _SCHEDULER + "make_stats",
        "overridden: attaches the counters",
        "SchedulerStats carries plugins' counters",
    ),
    Seam(
        _SCHEDULER + "_reserve_prefill_lookahead",
        "overridden: ends a chunk at the prompt's end, and drafts before a window",
        "schedulers may bound a chunk per request",
        ("request", "num_computed_tokens", "num_new_tokens"),
    ),
    Seam(
        _SCHEDULER + "_get_local_prefix_cache_hit",
        "overridden: a hit leaves the observation window to compute",
        "KVCacheManager.get_computed_blocks takes a limit",
        ("request",),
    ),
    Seam(
        _SCHEDULER + "_free_request_blocks",
        "overridden: the one place where a request loses its blocks",
        "KV cache managers learn of it with the request",
        ("request",),
    ),
    Seam(
        "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.find_longest_cache_hit",
        "wrapped on the objects, the connector's too: bounds the length of a hit",
        "KVCacheManager.get_computed_blocks takes a limit",
        ("block_hashes", "max_cache_hit_length"),
    ),
    Seam(
        "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.cache_blocks",
        "wrapped on the object: no block that saw a compressed context is hashed",
        "KVCacheManager.cache_blocks takes a limit",
        ("request", "num_computed_tokens"),
    ),
    Seam(
        "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1."
        "get_num_new_matched_tokens",
        "wrapped on the object: knows whose hit is looked for",
        "KV connectors are given a limit",
        ("request", "num_computed_tokens"),
    ),
    Seam(
        "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
        "wrapped on the object: a KV connector sees emptied blocks before others do",
        "KV connectors may store blocks of a step at its end",
        ("request",),
    ),
    Seam(
        "vllm.v1.simple_kv_offload.metadata:SimpleCPUOffloadMetadata",
        "read: whether a step loads blocks",
        "vLLM orders loads behind steps that are under way",
        ("load_gpu_blocks",),
    ),
    Seam(
        "vllm.v1.core.single_type_kv_cache_manager:"
        "FullAttentionManager.pop_blocks_for_free",
        "overridden: private blocks go back with the others",
        "never: managers are registered with their spec",
        ("request_id",),
    ),
    Seam(
        "vllm.v1.core.block_pool:BlockPool._maybe_evict_cached_block",
        "called: takes over an own block when the pool is dry",
        "BlockPool has a public way to drop a block's hash",
        ("block",),
    ),
    Seam(
        "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry._ensure_registered",
        "called before we register, else vLLM's own specs are never added",
        "register() does it",
    ),
    Seam(
        "vllm.v1.attention.selector:_cached_get_attn_backend",
        "its cache is cleared around the registration of our backends",
        "register_backend() clears it",
    ),
    Seam(
        "vllm.model_executor.layers.attention:Attention.get_kv_cache_spec",
        "replaced on the layer object: names our spec",
        _LAYER,
        ("vllm_config",),
    ),
    Seam(
        "vllm.model_executor.layers.attention:Attention.get_attn_backend",
        "its answer is replaced on the layer object: a backend on one-head pages",
        _LAYER,
    ),
    Seam(
        "vllm.v1.attention.backend:AttentionBackend.supported_kv_cache_layouts",
        "overridden: one-head pages are laid out head by head",
        "a KV cache spec may ask for a layout",
    ),
    Seam(
        _TRITON + "_ensure_scale_caches",
        "called early; a deep layer's answer is set on the object: other scales",
        "a KV cache spec may name where scales are",
        ("kv_cache",),
    ),
    Seam(
        _TRITON + "forward",
        "called on a copy: factors of pages are given as scales of a quantised cache",
        "Triton's attention takes factors of pages of any type",
        ("layer", "kv_cache", "attn_metadata"),
    ),
    Seam(
        "vllm.v1.attention.ops.triton_reshape_and_cache_flash:"
        "triton_reshape_and_cache_flash_per_token_head_quant",
        "called: writes merged tokens in 8 bits",
        "never: it is vLLM's format",
        ("key", "k_scale_cache", "slot_mapping", "kv_quant_mode"),
    ),
    Seam(
        "vllm.v1.attention.ops.int4_per_token_head:_run_reshape_kernel",
        "called: writes merged tokens in 4 bits, which are rotated already",
        "reshape_and_cache_int4 takes rotated vectors",
        ("kernel", "k_scale_cache", "slot_mapping", "packing_factor"),
    ),
    Seam(
        "vllm.v1.attention.ops.int4_per_token_head:_reshape_cache_int4_kernel",
        "its kernel",
        "reshape_and_cache_int4 takes rotated vectors",
    ),
    Seam(
        "vllm.v1.worker.utils:customize_attention_spec",
        "called: the bytes of a page, scales included",
        "an attention layer's spec is final",
        ("backend", "spec"),
    ),
    Seam(
        "vllm.v1.worker.gpu_worker:Worker.determine_available_memory",
        "overridden: less by what the factors of merged pages take",
        "a KV cache spec may ask for memory beside its pages",
    ),
    Seam(
        V1 + ".get_kv_cache_spec",
        "overridden: a draft model's layers are the first group, whose rows it reads",
        "V1 gives DraftModelProposer the metadata of its own group",
    ),
    Seam(
        "vllm.model_executor.models.interfaces:supports_multimodal",
        "called: such a model may add images between layers, where tokens are pruned",
        "models tell what they add to a layer's output",
        ("model",),
    ),
    Seam(V1 + ".get_model", "called: other layers are a draft model's", _LAYER),
    Seam(V2 + ".get_model", "called: other layers are a draft model's", _LAYER),
    Seam(
        "vllm.distributed:get_pp_group",
        "called: counts the layers of stages below, and tells the last one counts",
        "a KV cache spec learns of its layer's place in the whole model",
    ),
    Seam(
        "vllm.distributed:get_tp_group",
        "called: finds the worker that answers",
        _HOOKS,
    ),
    Seam(
        "vllm.distributed:get_tensor_model_parallel_rank",
        "called: numbers this worker's KV heads",
        _HEADS,
    ),
    Seam(
        "vllm.distributed:tensor_model_parallel_all_gather",
        "called: scores and queries of KV heads that other workers hold",
        "never: it is how vLLM's own layers do it",
        ("input_", "dim"),
    ),
    Seam(
        "vllm.distributed:tensor_model_parallel_all_reduce",
        "called: the mean over all heads",
        "never: it is how vLLM's own layers do it",
        ("input_",),
    ),
    Seam(
        "vllm.config.model_arch:ModelArchitectureConfig.__getitem__",
        "called: how many KV heads a layer has on all workers",
        _HEADS,
        ("layer_idx",),
    ),
    Seam(
        "vllm.v1.outputs:EMPTY_MODEL_RUNNER_OUTPUT",
        "compared with: stages but the last share it, so it takes no report",
        _HOOKS,
    ),
    Seam(V1 + ".initialize_kv_cache", "overridden: binds layers and builders", _HOOKS),
    Seam(
        V1 + "._update_states",
        "overridden: forgets requests that left",
        _HOOKS,
        ("scheduler_output",),
    ),
    Seam(
        V1 + "._prepare_inputs",
        "overridden: knows the order of rows; real batches only",
        _HOOKS,
        ("scheduler_output", "num_scheduled_tokens"),
    ),
    Seam(
        V1 + "._determine_batch_execution_and_padding",
        "overridden: a chunk of one token is no decode while queries are captured",
        _HOOKS,
        ("force_uniform_decode",),
    ),
    Seam(V1 + ".execute_model", "overridden: takes the plan", _HOOKS),
    Seam(V1 + ".sample_tokens", "overridden: compresses after it", _HOOKS),
    Seam(V2 + ".initialize_kv_cache", "overridden: binds layers and builders", _HOOKS),
    Seam(
        V2 + "._remove_request",
        "overridden: forgets requests that left",
        _HOOKS,
        ("req_id",),
    ),
    Seam(
        V2 + ".prepare_attn",
        "overridden: knows the order of rows; real batches only",
        _HOOKS,
        ("input_batch",),
    ),
    Seam(
        V2 + ".gather_batch_req_state",
        "overridden: a chunk of one token is no decode while queries are captured",
        _HOOKS,
    ),
    Seam(V2 + ".execute_model", "overridden: takes the plan", _HOOKS),
    Seam(V2 + ".sample_tokens", "overridden: compresses after it", _HOOKS),
    Seam(
        "vllm.v1.engine.input_processor:InputProcessor._validate_params",
        "wrapped: refuses bad per-request settings",
        "plugins may validate extra_args",
        ("params",),
    ),
    Seam(
        "vllm.v1.engine.async_llm:AsyncLLM.generate",
        "wrapped: refuses them before a stream has sent status 200",
        "plugins may validate extra_args",
        ("prompt", "sampling_params"),
    ),
    Seam(
        "vllm.v1.engine:EngineCoreOutput.kv_transfer_params",
        "set: tells a request that asks what was kept of it",
        "vLLM has room for plugins' words in its answers",
    ),
    Seam(
        "vllm.v1.metrics.loggers:StatLoggerManager",
        "wrapped: adds a logger to engines that compress",
        "stat logger plugins may be chosen per engine",
        ("vllm_config",),
    ),
)
