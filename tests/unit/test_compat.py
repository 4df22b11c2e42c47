"""The seams of vLLM that we touch are where we expect them."""

import dataclasses

import pytest

from vllm_kvcompress.config import ConfigError
from vllm_kvcompress.engine import compat
from vllm_kvcompress.engine.check import seams

pytestmark = pytest.mark.compat


@pytest.mark.parametrize(
    "seam", [*compat.SEAMS, *seams.SEAMS], ids=lambda seam: seam.target
)
def test_seam_is_there(seam: compat.Seam) -> None:
    compat.resolve(seam)
    assert seam.why and seam.gone_when


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "vllm.v1.core.block_pool:BlockPool.nothing"}, "is gone"),
        ({"target": "vllm.v1.nowhere:BlockPool"}, "is gone"),
        ({"parameters": ("block", "colour")}, "takes no colour"),
    ],
)
def test_a_moved_seam_is_found(change: dict, message: str) -> None:
    seam = next(s for s in compat.SEAMS if "_maybe_evict" in s.target)
    with pytest.raises(ConfigError, match=message):
        compat.resolve(dataclasses.replace(seam, **change))
