"""KV offloading with compression, by other settings than in `test_offloading`."""

from pathlib import Path
from typing import Any

import pytest

from tests.engine import offload_harness
from tests.engine.conftest import engine, scheduler
from tests.engine.offload_harness import drain, stored, tight
from tests.engine.serving import ENGINE, SERVERS, ask, requests
from vllm_kvcompress.engine.check.switch import VARIABLE

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = {"lazy": {"lazy_offload": True}, "little": {"cpu_bytes_to_use": 2**20}}


@pytest.mark.parametrize("extra", SETTINGS.values(), ids=SETTINGS)
def test_answers(
    llama: Path, extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks stored when they are about to be lost; and memory for few of them."""
    monkeypatch.setenv(VARIABLE, "poison")
    offload_harness.boot(monkeypatch)
    config = {"kv_compression": SERVERS["even"]}
    asked = requests(SERVERS["even"])
    with engine(llama, additional_config=config, **ENGINE) as llm:
        plain = ask(llm, asked)
    transfer = offload_harness.transfer_config(**extra)
    with engine(
        llama, additional_config=config, kv_transfer_config=transfer, **ENGINE
    ) as llm:
        for _ in range(3):
            with tight(llm, asked):
                found = ask(llm, asked)
            for request, mine, theirs in zip(asked, found, plain, strict=True):
                assert mine.near(theirs), (request.method, request.length)
            drain(llm)
            assert stored(llm)
            assert scheduler(llm).reset_prefix_cache()
