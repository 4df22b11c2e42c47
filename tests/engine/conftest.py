"""Real vLLM engines on small random models, in this process."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import pytest
import torch

VOCAB = 512
BLOCK = 32


def save_llama(path: Path, *, kv_heads: int = 2, layers: int = 2) -> Path:
    """Write a random Llama whose attention is sharp, so that lost keys show."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=kv_heads,
            head_dim=32,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.mul_(6.0 if "q_proj" in name or "k_proj" in name else 4.0)
    model.save_pretrained(path)
    return path


def save_lopsided(path: Path, *, kv_heads: int = 2) -> Path:
    """The same with a first KV head that looks everywhere; heads' needs differ."""
    from safetensors.torch import load_file, save_file

    save_llama(path, kv_heads=kv_heads)
    weights = load_file(path / "model.safetensors")
    for name, weight in weights.items():
        if "q_proj" in name:
            weight[: len(weight) // kv_heads] *= 0.02
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer random Llama with 2 KV heads of 4 query heads each."""
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def lopsided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, from `save_lopsided`."""
    return save_lopsided(tmp_path_factory.mktemp("lopsided"))


@pytest.fixture(scope="session")
def deep_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as `llama` with 4 layers."""
    return save_llama(tmp_path_factory.mktemp("deep"), layers=4)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes a family's model once."""
    from tests.picture_models import FAMILIES

    found: dict[str, Path] = {}

    def saved(family: str) -> Path:
        if family not in found:
            found[family] = FAMILIES[family].save(tmp_path_factory.mktemp(family))
        return found[family]

    return saved


@contextlib.contextmanager
def engine(model: Path, **kwargs: Any) -> Iterator[Any]:
    """An ``LLM`` that is gone at the end, with all of its memory."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 2048,
        "enforce_eager": True,
        "block_size": BLOCK,
        "max_logprobs": -1,
        "num_gpu_blocks_override": 400,
    }
    llm = LLM(str(model), **{**defaults, **kwargs})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def scheduler(llm: Any) -> Any:
    """The engine's own scheduler object."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def free_blocks(llm: Any) -> int:
    """Blocks in the pool's free queue."""
    return scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks()


def attention(llm: Any) -> list[Any]:
    """The engine's own attention layers, from the bottom."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    config = worker.model_runner.vllm_config.compilation_config
    return list(config.static_forward_context.values())


def calibrate(llm: Any) -> list[tuple[float, float]]:
    """Give every layer scales of 8-bit floats of its own, of keys and of values."""
    scales = []
    for index, layer in enumerate(attention(llm)):
        layer._k_scale_float, layer._v_scale_float = 2.0**-index, 2.0 ** (index - 4)
        scales.append((layer._k_scale_float, layer._v_scale_float))
        for own, scale in zip(
            (layer._k_scale, layer._v_scale), scales[-1], strict=True
        ):
            own.fill_(scale)
    return scales


def block_bytes(llm: Any) -> int:
    """Bytes of memory per block of the pool: pages, and factors beside them."""
    layers = attention(llm)
    pages = {layer.kv_cache.data_ptr(): layer.kv_cache for layer in layers}
    scaled = [layer.page_scales for layer in layers if hasattr(layer, "page_scales")]
    factors = {own.data_ptr(): own for own in scaled}
    found = sum(cache[0].nbytes for cache in pages.values())
    return found + sum(own[:, 0].nbytes for own in factors.values())


def blocks_held(llm: Any, tokens: list[int]) -> int:
    """Blocks of a request one step after its prompt was read."""
    from vllm import SamplingParams

    before = free_blocks(llm)
    params = SamplingParams(max_tokens=8, ignore_eos=True, detokenize=False)
    name = llm.llm_engine.add_request("77", {"prompt_token_ids": tokens}, params)
    requests = scheduler(llm).requests
    while not (requests and requests[name].num_output_tokens > 1):
        llm.llm_engine.step()
    held = before - free_blocks(llm)
    llm.llm_engine.abort_request([name], internal=True)
    return held


def preemptions(llm: Any) -> list[int]:
    """Collects how many compressions each preemption undoes."""
    seen: list[int] = []
    original = scheduler(llm)._preempt_request
    managers = scheduler(llm)._managers.values()

    def counting(request: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(sum(m.compressed(request.request_id) for m in managers))
        original(request, *args, **kwargs)

    scheduler(llm)._preempt_request = counting
    return seen


@contextlib.contextmanager
def chunks(llm: Any, tokens: int) -> Iterator[None]:
    """Schedule no more than so many tokens per step."""
    before = scheduler(llm).max_num_scheduled_tokens
    scheduler(llm).max_num_scheduled_tokens = tokens
    try:
        yield
    finally:
        scheduler(llm).max_num_scheduled_tokens = before


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (length,), generator=generator).tolist()


@dataclass
class Answer:
    """One request's outcome: tokens, ``[tokens, VOCAB]`` logprobs, prefix hits."""

    tokens: list[int]
    logprobs: torch.Tensor
    cached: int

    def same(self, other: "Answer") -> bool:
        """Byte-identical."""
        return self.tokens == other.tokens and torch.equal(
            self.logprobs, other.logprobs
        )

    def near(self, other: "Answer", tolerance: float = 2e-4) -> bool:
        """The same tokens, and logprobs equal up to the order of additions."""
        return (
            self.tokens == other.tokens
            and float((self.logprobs - other.logprobs).abs().max()) < tolerance
        )


def generate(
    llm: Any,
    prompts: Sequence[list[int] | dict[str, Any]],
    count: int | list[int] = 12,
    each: list[dict[str, Any]] | None = None,
    priority: list[int] | None = None,
    lora_request: Any = None,
    **params: Any,
) -> list[Answer]:
    """Greedy answers with the log-probabilities of the whole vocabulary.

    Args:
        llm: The engine.
        prompts: Tokens, or what vLLM takes besides; served at once.
        count: Tokens to generate, of all or of each.
        each: Sampling parameters of each prompt.
        priority: Of each prompt, lower is sooner.
        lora_request: The adapter of all.
        params: Sampling parameters of all.

    Returns:
        One per prompt, or as many as ``n`` says.
    """
    from vllm import SamplingParams

    counts = count if isinstance(count, list) else [count] * len(prompts)
    sampling = [
        SamplingParams(
            **{
                "max_tokens": n,
                "temperature": 0.0,
                "detokenize": False,
                "logprobs": -1,
                "ignore_eos": True,
                **params,
                **own,
            }
        )
        for n, own in zip(counts, each or [{}] * len(prompts), strict=True)
    ]
    outputs = llm.generate(
        [p if isinstance(p, dict) else {"prompt_token_ids": p} for p in prompts],
        sampling,
        use_tqdm=False,
        priority=priority,
        lora_request=lora_request,
    )
    answers = []
    for output, completion in ((o, c) for o in outputs for c in o.outputs):
        rows = [[row[t].logprob for t in range(VOCAB)] for row in completion.logprobs]
        answers.append(
            Answer(
                list(completion.token_ids),
                torch.tensor(rows),
                output.num_cached_tokens or 0,
            )
        )
    return answers


@dataclass
class Recording:
    """What the worker scored and kept, in the order of execution.

    An item of ``kept`` holds a layer's rows; they differ in length where KV heads do.
    """

    kept: list[Any] = field(default_factory=list)
    queries: list[torch.Tensor] = field(default_factory=list)
    keys: list[torch.Tensor] = field(default_factory=list)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Recording:
    """Listen to our own selection; nothing of vLLM is touched."""
    from vllm_kvcompress.engine import executor, uneven
    from vllm_kvcompress.methods.snapkv import SnapKV
    from vllm_kvcompress.ops.pages import PagedKeys

    record = Recording()
    select, score = executor.select, SnapKV.score
    select_each = uneven.select_each

    def recording_select(scores: torch.Tensor, count: int) -> torch.Tensor:
        record.kept.append(select(scores, count))
        return record.kept[-1]

    def recording_score(self: Any, queries: Any, keys: Any, *args: Any, **kw: Any):
        record.queries.append(queries.clone())
        held = keys.dense() if isinstance(keys, PagedKeys) else keys
        record.keys.append(held.clone())
        return score(self, queries, keys, *args, **kw)

    def recording_select_each(scores: torch.Tensor, counts: list[int]) -> Any:
        record.kept.append(select_each(scores, counts))
        return record.kept[-1]

    monkeypatch.setattr(executor, "select", recording_select)
    monkeypatch.setattr(uneven, "select_each", recording_select_each)
    monkeypatch.setattr(SnapKV, "score", recording_score)
    return record


Engine = Callable[..., contextlib.AbstractContextManager[Any]]
