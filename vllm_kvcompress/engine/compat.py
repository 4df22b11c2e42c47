"""Every internal of vLLM that we touch, and how its moving would show.

A seam that is gone is found at start-up, in one sentence, and by a test.
"""

import importlib
import inspect
from dataclasses import dataclass

from ..config import KEY, ConfigError


@dataclass(frozen=True)
class Seam:
    """One place of vLLM 0.32 that is not a documented plugin interface.

    Attributes:
        target: ``module:attribute`` path.
        why: What we use it for.
        gone_when: When we could do without.
        parameters: Parameter names that must exist there.
    """

    target: str
    why: str
    gone_when: str
    parameters: tuple[str, ...] = ()


_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler."
_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner."
_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner."
_TRITON = "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl."
_PLAN = "vLLM has a channel for plugins from scheduler to workers"
_FIELDS = "EngineArgs lets plugins add fields"
_HOOKS = "vLLM's runners call hooks around a step"
_LAYER = "customize_spec learns of the layer"

SEAMS = (
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
        _V1 + "get_kv_cache_spec",
        "overridden: a draft model's layers are the first group, whose rows it reads",
        "V1 gives DraftModelProposer the metadata of its own group",
    ),
    Seam(_V1 + "get_model", "called: other layers are a draft model's", _LAYER),
    Seam(_V2 + "get_model", "called: other layers are a draft model's", _LAYER),
    Seam(
        "vllm.distributed:get_pp_group",
        "called: counts the layers of stages below, and finds the last one",
        "a KV cache spec learns of its layer's place in the whole model",
    ),
    Seam(
        "vllm.v1.outputs:EMPTY_MODEL_RUNNER_OUTPUT",
        "compared with: stages but the last share it, so it takes no report",
        _HOOKS,
    ),
    Seam(_V1 + "initialize_kv_cache", "overridden: binds layers and builders", _HOOKS),
    Seam(
        _V1 + "_update_states",
        "overridden: forgets requests that left",
        _HOOKS,
        ("scheduler_output",),
    ),
    Seam(
        _V1 + "_prepare_inputs",
        "overridden: knows the order of rows; real batches only",
        _HOOKS,
        ("scheduler_output", "num_scheduled_tokens"),
    ),
    Seam(
        _V1 + "_determine_batch_execution_and_padding",
        "overridden: a chunk of one token is no decode while queries are captured",
        _HOOKS,
        ("force_uniform_decode",),
    ),
    Seam(_V1 + "execute_model", "overridden: takes the plan", _HOOKS),
    Seam(_V1 + "sample_tokens", "overridden: compresses after it", _HOOKS),
    Seam(_V2 + "initialize_kv_cache", "overridden: binds layers and builders", _HOOKS),
    Seam(
        _V2 + "_remove_request",
        "overridden: forgets requests that left",
        _HOOKS,
        ("req_id",),
    ),
    Seam(
        _V2 + "prepare_attn",
        "overridden: knows the order of rows; real batches only",
        _HOOKS,
        ("input_batch",),
    ),
    Seam(
        _V2 + "gather_batch_req_state",
        "overridden: a chunk of one token is no decode while queries are captured",
        _HOOKS,
    ),
    Seam(_V2 + "execute_model", "overridden: takes the plan", _HOOKS),
    Seam(_V2 + "sample_tokens", "overridden: compresses after it", _HOOKS),
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


def check_engine() -> None:
    """Look at every seam outside of the model runners.

    Raises:
        ConfigError: See `resolve`.
    """
    for seam in SEAMS:
        if not seam.target.startswith((_V1, _V2)):
            resolve(seam)


def check_runner(v2: bool) -> None:
    """Look at the seams of one model runner.

    Raises:
        ConfigError: See `resolve`.
    """
    for seam in SEAMS:
        if seam.target.startswith(_V2 if v2 else _V1):
            resolve(seam)


def resolve(seam: Seam) -> object:
    """The object behind a seam.

    Raises:
        ConfigError: It is gone, or has lost a parameter.
    """
    module, _, path = seam.target.partition(":")
    try:
        found: object = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        raise ConfigError(_moved(seam, "is gone")) from None
    if seam.parameters:
        has = inspect.signature(found).parameters  # type: ignore[arg-type]
        missing = [name for name in seam.parameters if name not in has]
        if missing:
            raise ConfigError(_moved(seam, f"takes no {', '.join(missing)}"))
    return found


def _moved(seam: Seam, what: str) -> str:
    return (
        f"{KEY}: vLLM's {seam.target} {what} in this version; install vLLM 0.32, "
        "or start without --kv-compression"
    )
