"""What ``VLLM_KVCOMPRESS_CHECK`` may say."""

import pytest

from vllm_kvcompress.config import ConfigError
from vllm_kvcompress.engine.check.switch import VARIABLE, Switch


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("", None),
        ("0", None),
        ("1", Switch()),
        ("100", Switch(every=100)),
        ("poison", Switch(poison=True)),
    ],
)
def test_values(
    value: str, wanted: Switch | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    assert Switch.read() == wanted


def test_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert Switch.read() is None


@pytest.mark.parametrize("value", ["on", "-1", "1.5", "00", "poison 3"])
def test_other_values_are_refused_in_one_sentence(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ConfigError) as error:
        Switch.read()
    assert f"{VARIABLE}={value!r}" in str(error.value)
    assert "poison" in str(error.value)
