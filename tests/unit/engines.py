"""vLLM's configuration for the engines that the simulator runs."""

import copy
import json
import tempfile
from functools import cache
from pathlib import Path

import torch
from vllm.config import SpeculativeConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import (
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)

from tests.shadow import BLOCK, VOCAB
from tests.unit.workloads import MAX_LEN, Workload
from vllm_kvcompress.config import KEY, KVCompressionConfig
from vllm_kvcompress.engine.spec import CompressedAttentionSpec

SLIDING_WINDOW = 7


@cache
def base_config() -> VllmConfig:
    """vLLM's configuration for a model that is never built."""
    llama = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": VOCAB,
        "max_position_embeddings": MAX_LEN,
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(llama))
        return EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=MAX_LEN,
            enforce_eager=True,
        ).create_engine_config()


def configs(load: Workload) -> tuple[VllmConfig, KVCacheConfig]:
    """A workload's engine, with at least the blocks that vLLM insists on."""
    config = copy.copy(base_config())
    config.additional_config = {KEY: load.settings}
    parallel = config.parallel_config = copy.copy(config.parallel_config)
    parallel.pipeline_parallel_size = load.stages
    scheduler = config.scheduler_config = copy.copy(config.scheduler_config)
    scheduler.async_scheduling = load.asynchronous
    scheduler.policy = load.policy
    scheduler.max_num_batched_tokens = load.chunk
    scheduler.max_num_scheduled_tokens = None
    scheduler.long_prefill_token_threshold = load.long_prefill
    scheduler.max_num_seqs = load.max_seqs
    scheduler.scheduler_reserve_full_isl = load.reserve
    if load.drafts:
        config.speculative_config = SpeculativeConfig(
            method="ngram",
            num_speculative_tokens=load.drafts,
            target_model_config=config.model_config,
            target_parallel_config=config.parallel_config,
        )
    common = dict(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    most_tokens = KVCompressionConfig.from_dict(load.settings).most_tokens
    tiers, specs = load.tiers(), []
    for group in range(len(load.groups)):
        if group in tiers:
            spec = CompressedAttentionSpec(
                **common, tier=tiers[group], most_tokens=most_tokens
            )
        else:
            spec = SlidingWindowSpec(**common, sliding_window=SLIDING_WINDOW)
        specs.append(spec)
    blocks = 1 + load.spare_blocks
    for spec in specs:
        blocks += spec.max_memory_usage_bytes(config) // spec.page_size_bytes
    cache_config = config.cache_config = copy.copy(config.cache_config)
    cache_config.enable_prefix_caching = load.caching
    cache_config.block_size = BLOCK
    cache_config.num_gpu_blocks = blocks
    groups = [KVCacheGroupSpec([str(i)], spec) for i, spec in enumerate(specs)]
    return config, KVCacheConfig(blocks, kv_cache_tensors=[], kv_cache_groups=groups)
