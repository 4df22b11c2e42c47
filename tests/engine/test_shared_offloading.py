"""KV offloading of models that share KV: what is loaded is what was stored."""

from pathlib import Path
from typing import Any

import pytest

from tests.engine import offload_harness
from tests.engine.conftest import BLOCK, engine, generate, prompt, scheduler
from tests.engine.shared_models import make

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

COMPRESSION = {"kv_compression": {"method": "snapkv", "budget": 96, "window": 16}}


@pytest.mark.parametrize("compressed", [False, True], ids=["whole", "compressed"])
@pytest.mark.parametrize("name", ["cla2", "lckv", "yoco", "yoco_retention"])
def test_what_was_stored_is_loaded(
    name: str, compressed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offload_harness.boot(monkeypatch)
    made = make(name, tmp_path)
    settings: dict[str, Any] = {"hf_overrides": made.exact} if made.exact else {}
    if compressed:
        settings["additional_config"] = COMPRESSION
    transfer = offload_harness.transfer_config()
    prompts = [prompt(n, seed=n) for n in (300, 90, 200)]
    with engine(made.path, kv_transfer_config=transfer, **settings) as llm:
        found = generate(llm, prompts, 40)
        assert not any(answer.cached for answer in found)
        for _ in range(3 * offload_harness.DELAY):
            llm.llm_engine.step()
        assert scheduler(llm).reset_prefix_cache()
        again = generate(llm, prompts, 40)
    assert all(a.near(b) for a, b in zip(again, found, strict=True))
    # A hit ends where the blocks of sliding windows were kept, so some have none.
    assert any(answer.cached >= 2 * BLOCK for answer in again)
