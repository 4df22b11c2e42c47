"""Who does an operation's work, and what is said where nobody can."""

import logging
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from vllm_kvcompress.ops import providers
from vllm_kvcompress.ops.compact import compact
from vllm_kvcompress.ops.providers import (
    ALL,
    AUTO,
    TORCH,
    Operation,
    ProviderError,
    Setting,
    choose,
    operations,
)
from vllm_kvcompress.ops.select import select
from vllm_kvcompress.ops.window_scores import window_scores

HERE = Setting(torch.device("cpu"))


def _chosen() -> dict[str, str]:
    return {operation.name: operation.provider for operation in operations().values()}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A provider that comes first and serves one operation."""
    module = ModuleType("a_library")
    module.KERNELS = {"select": lambda scores, count: "from the library"}
    module.refusal = lambda setting, operation: None
    monkeypatch.setitem(sys.modules, "a_library", module)
    found = {"library": "a_library", **providers.PROVIDERS}
    monkeypatch.setattr(providers, "PROVIDERS", found)
    return module


def test_nothing_is_chosen_before_start_up() -> None:
    code = """if True:
        from vllm_kvcompress.ops.providers import operations
        print({own.provider for own in operations().values()})
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "{'torch'}", done.stderr


def test_the_first_that_can_serves(library: ModuleType) -> None:
    choose(HERE, {})
    assert select.provider == "library"
    assert select(torch.zeros(1, 2), 1) == "from the library"
    assert compact.provider == window_scores.provider == "cpp"
    library.refusal = lambda setting, operation: "has had enough"
    choose(HERE, {})
    assert select.provider == "cpp"
    assert select(torch.tensor([[1.0, 2.0]]), 1).tolist() == [[1]]


def test_torch_for_all() -> None:
    choose(HERE, {})
    choose(HERE, {ALL: TORCH})
    assert set(_chosen().values()) == {TORCH}


def test_one_provider_for_one_operation() -> None:
    choose(HERE, {"select": TORCH})
    assert (select.provider, compact.provider) == (TORCH, "cpp")


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({ALL: "cuda"}, ["cuda cannot serve"]),
        ({"select": "cuda"}, ["cuda cannot serve select"]),
        ({"pool": "cpp"}, ["cpp cannot serve pool", "has no pool"]),
        ({"polish": "cpp"}, ["no operation polish", "window_scores"]),
    ],
    ids=str,
)
def test_what_is_asked_for_by_name_must_be_there(
    wanted: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(ProviderError) as caught:
        choose(HERE, wanted)
    assert all(word in str(caught.value) for word in words)


def test_the_choice_is_logged_once_with_reasons(
    library: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    library.refusal = lambda setting, operation: "has had enough of this"
    with caplog.at_level(logging.INFO, logger="vllm.plugins.kv_compression"):
        choose(HERE, {})
        choose(HERE, {})
    (message,) = caplog.messages
    assert "cpp: " in message
    assert "library: has had enough of this" in message
    assert message.count("has had enough") == 1


def test_a_library_that_was_not_compiled_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(providers.PROVIDERS, "cpp", "vllm_kvcompress.ops.nowhere")
    with caplog.at_level(logging.INFO, logger="vllm.plugins.kv_compression"):
        choose(HERE, {ALL: AUTO})
    assert "cpp" not in _chosen().values()
    assert "cpp: No module named" in caplog.text


def test_an_operation_keeps_its_name_and_words() -> None:
    assert isinstance(select, Operation)
    assert select.__name__ == "select"
    assert "highest scores" in str(select.__doc__)
