"""Switches compression on in one engine's configuration, or refuses.

vLLM's own settings carry it to every process: the names of our scheduler and
worker classes. Nothing of vLLM is replaced.
"""

from vllm import envs
from vllm.config import ModelConfig, VllmConfig

from ..config import KEY, ConfigError, KVCompressionConfig
from ..methods.minicache import MiniCache
from ..prunable import prunable
from . import compat, metrics, requests
from .check.switch import Switch
from .connectors import choose_connector, connector_refusals
from .page_formats import QUANTISED, UNQUANTISED, has_scales
from .worker import WORKERS

# Ways to draft. EAGLE and its like add a layer or two; a KV cache group of theirs would
# have vLLM cut all other groups down to as many.
DRAFTS = ("ngram", "ngram_gpu", "suffix", "draft_model")


def enable(vllm_config: VllmConfig, config: KVCompressionConfig) -> None:
    """Choose the compressing scheduler and worker.

    Raises:
        ConfigError: Something else that is switched on cannot work with it.
    """
    choose_connector(vllm_config)
    for setting, way_out in _refusals(vllm_config, config):
        raise ConfigError(f"{KEY} does not work with {setting}; {way_out}")
    compat.check_engine()
    package = "vllm_kvcompress.engine"
    kind = "Compressed"
    if Switch.read():
        package, kind = f"{package}.check", "Checked"
    scheduler = vllm_config.scheduler_config
    timing = "Async" if scheduler.async_scheduling else ""
    if config.prefill == "incremental":
        # The whole prompt need not fit at once.
        scheduler.scheduler_reserve_full_isl = False
    scheduler.scheduler_cls = f"{package}.scheduler.{kind}{timing}Scheduler"
    parallel = vllm_config.parallel_config
    worker = WORKERS[parallel.worker_cls].replace("Compressed", kind)
    parallel.worker_cls = f"{package}.worker.{worker}"
    requests.install()
    metrics.install()


def _prunable(model: ModelConfig) -> bool:
    part = model.hf_text_config.model_type if model.is_multimodal_model else None
    return prunable(model.architecture, part)


def _refusals(
    vllm_config: VllmConfig, config: KVCompressionConfig
) -> list[tuple[str, str]]:
    """Settings in use that are not supported, each with the way out."""
    model = vllm_config.model_config
    cache = vllm_config.cache_config
    parallel = vllm_config.parallel_config
    stages = parallel.pipeline_parallel_size
    executor = parallel.distributed_executor_backend
    scheduler = vllm_config.scheduler_config
    drop = "start without --kv-compression"
    chunk = min(
        scheduler.max_num_batched_tokens,
        scheduler.long_prefill_token_threshold or scheduler.max_num_batched_tokens,
    )
    window = config.window
    block_size = cache.block_size or 1
    smallest = config.smallest_budget(block_size)
    least = min(config.budgets, default=smallest)
    merges_all = isinstance(config.scorer, MiniCache) and config.scorer.over is None
    # 4-bit codes are of rotated vectors, which no query here is; heads that hold
    # unequally many tokens have no scales of their own.
    uneven = any(scorer.uneven for scorer in config.scorers.values())
    readable = [
        name
        for name in (*UNQUANTISED, *QUANTISED)
        if merges_all
        or not name.startswith("int4")
        and not (uneven and has_scales(name))
    ]
    prunes = any(scorer.prunes for scorer in config.scorers.values())
    drafts = getattr(vllm_config.speculative_config, "method", None)
    checks = [
        (model.runner_type != "generate", "pooling models", drop),
        (model.is_encoder_decoder, "encoder-decoder models", drop),
        (model.use_mla, "MLA attention", drop),
        (model.is_mm_prefix_lm, "bidirectional multimodal prefixes", drop),
        (
            cache.cache_dtype not in readable,
            f"--kv-cache-dtype {cache.cache_dtype}"
            + f" and method={config.method}" * (cache.cache_dtype in QUANTISED),
            "use --kv-cache-dtype auto or fp8"
            + ", or method=minicache without over" * (cache.cache_dtype in QUANTISED),
        ),
        (
            cache.kv_sharing_fast_prefill,
            "--kv-sharing-fast-prefill",
            "drop that flag",
        ),
        (
            stages > 1 and prunes,
            f"--pipeline-parallel-size {stages} and method={config.method}, which "
            "prunes layers",
            "use 1, or add prune=false, which drops their KV only",
        ),
        (
            prunes and vllm_config.lora_config is not None,
            f"--enable-lora and method={config.method}, which prunes layers",
            "drop that flag, or add prune=false, which drops their KV only",
        ),
        (
            stages > 1 and executor == "external_launcher",
            f"--pipeline-parallel-size {stages} and "
            f"--distributed-executor-backend {executor}",
            "use 1, or the backend mp or ray",
        ),
        (
            stages > 1 and drafts is not None,
            f"--pipeline-parallel-size {stages} and --speculative-config together",
            "drop one of them",
        ),
        (
            # Newer versions of vLLM have no other than the second.
            executor == "ray"
            and not getattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", True),
            "VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0",
            "leave it out, or use --distributed-executor-backend mp",
        ),
        (
            parallel.decode_context_parallel_size > 1
            or parallel.prefill_context_parallel_size > 1,
            "context parallelism (DCP, PCP)",
            "use size 1",
        ),
        (parallel.use_ubatching, "dual batch overlap", "drop --enable-dbo"),
        *connector_refusals(vllm_config),
        (
            # A merged pair's upper layer has its scales beside the pages.
            vllm_config.kv_transfer_config is not None
            and has_scales(cache.cache_dtype)
            and any(scorer.merges for scorer in config.scorers.values()),
            f"KV offloading, method={config.method} and --kv-cache-dtype "
            f"{cache.cache_dtype} together",
            "use --kv-cache-dtype auto or fp8, or drop --kv-offloading-size",
        ),
        (
            drafts not in (None, *DRAFTS),
            f"speculative decoding by {drafts}",
            f"use {', '.join(DRAFTS[:-1])} or {DRAFTS[-1]} in --speculative-config",
        ),
        (
            scheduler.disable_hybrid_kv_cache_manager is True,
            "--disable-hybrid-kv-cache-manager",
            "drop that flag",
        ),
        (
            scheduler.scheduler_cls is not None,
            f"--scheduler-cls {scheduler.scheduler_cls}",
            "drop that flag",
        ),
        (
            parallel.worker_cls not in WORKERS,
            f"worker class {parallel.worker_cls}",
            "use vLLM's CPU or CUDA worker",
        ),
        (
            chunk < window,
            f"prefill chunks of {chunk} tokens and an observation window of {window}",
            "raise --max-num-batched-tokens (or --long-prefill-token-threshold) "
            "or lower window",
        ),
        (
            prunes and not _prunable(model),
            f"method={config.method} on {model.architecture}, whose layers it cannot "
            "prune",
            "add prune=false, which drops their KV only",
        ),
        (
            least < smallest,
            f"budget={least} and KV blocks of {block_size} tokens",
            f"use a budget of at least {smallest}, or a smaller --block-size",
        ),
    ]
    return [(setting, way_out) for used, setting, way_out in checks if used]
