"""Check mode in real engines: it finds planted bugs, and freed blocks leak nothing."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import (
    BLOCK,
    Answer,
    engine,
    free_blocks,
    generate,
    preemptions,
    prompt,
    scheduler,
)
from tests.unit.planted import PLANTED, Planted
from vllm_kvcompress.config import ConfigError
from vllm_kvcompress.engine.check.ledger import Ledger, Violation
from vllm_kvcompress.engine.check.switch import VARIABLE
from vllm_kvcompress.engine.manager import CompressedKVManager
from vllm_kvcompress.engine.rows import RowShift
from vllm_kvcompress.engine.runner import RunnerV1

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

SETTINGS = {"method": "snapkv", "budget": 96, "window": 16}
LENGTHS = [900, 640, 333, 1025, 64, 480, 257, 700]
COUNT = 150
TIGHT = {
    "num_gpu_blocks_override": 44,
    "max_model_len": 1200,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 8,
}


PROMPTS = [prompt(n, seed=n) for n in LENGTHS]
for tokens in PROMPTS:  # all start alike, for blocks that requests share
    tokens[: 2 * BLOCK] = prompt(2 * BLOCK)


def serve(llm: Any) -> list[Answer]:
    return generate(llm, PROMPTS, COUNT)


def start(model: Path, **kwargs: Any) -> Any:
    return engine(model, additional_config={"kv_compression": SETTINGS}, **kwargs)


def _free_twice(take: Callable[..., Any]) -> Planted:
    return lambda self: 2 * take(self)


def _write_nothing(_: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: None


def _read_one_more(physical: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, common: Any, size: int, lens: torch.Tensor) -> Any:
        found = physical(self, common, size, lens)
        return found if found is common else _longer(found, size)

    return planted


def _longer(common: Any, size: int) -> Any:
    """Every row one block too long."""
    return common.replace(
        seq_lens=common.seq_lens + size, max_seq_len=common.max_seq_len + size
    )


REQUEST = r"request \S+, group 0: "
# What is planted, and what the engine says before it stops.
FOUND = {
    "freed twice": (
        (CompressedKVManager, "take_pending", _free_twice, {}),
        r"block \d+ has ref_cnt (-1|0), and (nobody|group 0 of request \S+) holds it",
    ),
    "a freed block stays in a row": (
        (RunnerV1, "_write_row", _write_nothing, {}),
        REQUEST + r"its row has \(.*\) not \(.*\)",
    ),
    "a row one block too long": (
        (RowShift, "physical", _read_one_more, {}),
        REQUEST + r"attention reads \d+ tokens, not \d+",
    ),
    "a shift forgotten": (
        (RowShift, "set", _write_nothing, {}),
        REQUEST + r"attention reads \d+ tokens, not \d+",
    ),
    "compaction in place": (
        PLANTED["compaction in place"],
        REQUEST + r"private block \d+ is not its own",
    ),
    "freed at planning": (
        PLANTED["freed at planning"],
        REQUEST + r"block \d+ is read and free",
    ),
    "never freed": (PLANTED["never freed"], REQUEST + "keeps originals"),
    "private lost": (
        PLANTED["private lost"],
        r"block \d+ has ref_cnt 1, and nobody holds it",
    ),
    "approximate KV hashed": (
        PLANTED["approximate KV hashed"],
        REQUEST + r"block \d+ is hashed behind \d+",
    ),
}
QUICK = ["freed twice", "a freed block stays in a row", "compaction in place"]


@pytest.mark.parametrize(
    "bug",
    [b if b in QUICK else pytest.param(b, marks=pytest.mark.slow) for b in FOUND],
)
def test_a_planted_bug_stops_the_engine(
    bug: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (owner, name, plant, _), told = FOUND[bug]
    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.setattr(owner, name, plant(getattr(owner, name)))
    with start(llama, **TIGHT) as llm, pytest.raises(Violation, match=told):
        serve(llm)


@pytest.fixture(scope="module")
def alone(llama: Path) -> Iterator[list[Answer]]:
    """Each request in an engine without checks, with nobody else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(VARIABLE, raising=False)
        with start(llama) as llm:
            classes = [type(scheduler(llm)), type(_worker(llm))]
            found = [generate(llm, [tokens], COUNT)[0] for tokens in PROMPTS]
    assert all(c.__name__.startswith("Compressed") for c in classes), classes
    return found


def _worker(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


@pytest.mark.parametrize("caching", [True, False], ids=["prefix-cache", "no-cache"])
def test_freed_blocks_leak_nothing(
    llama: Path, alone: list[Answer], caching: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever read a freed or an unwritten slot would answer something else."""
    monkeypatch.setenv(VARIABLE, "poison")
    with start(llama, enable_prefix_caching=caching, **TIGHT) as llm:
        before, preempted = free_blocks(llm), preemptions(llm)
        for _ in range(2):  # the second time among poisoned blocks only
            for mine, theirs in zip(serve(llm), alone, strict=True):
                assert mine.near(theirs)
        assert preempted
        assert free_blocks(llm) == before


def test_poison_shows_a_leak_that_checks_do_not_see(
    llama: Path, alone: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted below the checks: vLLM's own builder lengthens what it is given."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

    build = CPUAttentionMetadataBuilder.build

    def planted(self: Any, prefix: int, common: Any, *args: Any) -> Any:
        return build(self, prefix, _longer(common, BLOCK), *args)

    monkeypatch.setattr(CPUAttentionMetadataBuilder, "build", planted)
    monkeypatch.setenv(VARIABLE, "poison")
    with start(llama) as llm:
        answers = serve(llm)
    assert not any(a.near(b) for a, b in zip(answers, alone, strict=True))
    assert not any(bool(answer.logprobs.isfinite().all()) for answer in answers)


def test_sampled_checks(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tenth step; nothing is checked in between."""
    steps: list[int] = []
    check = Ledger.check

    def counting(self: Ledger, plan: Any) -> None:
        steps.append(self._scheduler._steps)
        check(self, plan)

    monkeypatch.setattr(Ledger, "check", counting)
    monkeypatch.setenv(VARIABLE, "10")
    with start(llama, **TIGHT) as llm:
        serve(llm)
        last = scheduler(llm)._steps
    assert steps == [*range(10, last + 1, 10)]


def test_a_bad_value_is_refused_at_start(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "always")
    with pytest.raises(ConfigError, match=f"{VARIABLE}='always' is not possible"):
        start(llama).__enter__()
