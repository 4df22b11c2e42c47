"""Two layers' pages merged, against loops; no engine is started."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from tests.oracle import minicache
from vllm_kvcompress.engine.merging import Part, merge_layers
from vllm_kvcompress.engine.shared_pages import new_scales
from vllm_kvcompress.methods.minicache import MiniCache

pytestmark = pytest.mark.vllm

BLOCK, HEADS, SIZE = 4, 2, 8
SOURCES = [[3, 1, 7, 5, 9], [2, 8, 4, 6, 10]]
WHOLE, TOKENS = 4 * BLOCK, 4 * BLOCK + 2
OUTLIERS = [1, 6, 11, 12]
Tensor = torch.Tensor


OWN = [[0, 0, 0, 13], [0, 0, 0, 14]]  # for what is retained


class Pair:
    """Two layers that see one memory, and what they hold there of a request."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (HEADS, TOKENS, 2 * SIZE)
        shallow = torch.randn(shape, generator=generator)
        deep = shallow + 0.5 * torch.randn(shape, generator=generator)
        deep[:, OUTLIERS] = -3 * shallow[:, OUTLIERS] + 0.01
        self.held = [shallow, deep]
        self.cache = torch.zeros(16, HEADS, BLOCK, 2 * SIZE)

    def merge(self, blocks: int, t: float = 0.6) -> list[list[Tensor]]:
        """Merge so many blocks; layer -> what it reads, keys beside values."""
        targets = [[11, 12, 15, 13][:blocks] + own[blocks:] for own in OWN]
        for held, source in zip(self.held, SOURCES, strict=True):
            padded = torch.nn.functional.pad(held, (0, 0, 0, 5 * BLOCK - TOKENS))
            self.cache[source] = padded.unflatten(1, (-1, BLOCK)).transpose(0, 1)
        impl = SimpleNamespace(kv_cache_dtype="auto", scale=0.3)
        layers = [
            SimpleNamespace(
                kv_cache_dtype="auto",
                kv_cache=self.cache,
                compressed_index=i,
                impl=impl,
            )
            for i in range(2)
        ]
        layers[1].page_scales = new_scales(self.cache)
        parts = [
            Part(layer, torch.tensor(source), torch.tensor(target))
            for layer, source, target in zip(layers, SOURCES, targets, strict=True)
        ]
        merge_layers(MiniCache(start_layer=0, t=t), *parts, TOKENS, WHOLE, blocks)
        return [self._read(layer, t) for layer, t in zip(layers, targets, strict=True)]

    def _read(self, layer: Any, blocks: list[int]) -> list[Tensor]:
        found = self.cache[blocks].transpose(0, 1).flatten(1, 2)
        if (scales := getattr(layer, "page_scales", None)) is not None:
            keys, values = scales[:, blocks].flatten(1, 2).transpose(1, 2)[..., None]
            found = found * torch.cat(
                [keys.expand(-1, -1, SIZE), values.expand(-1, -1, SIZE)], -1
            )
        return [*found]


@pytest.mark.parametrize("t", [0.0, 0.6, 1.0])
def test_pages_are_the_loops(t: float) -> None:
    pair = Pair()
    read = pair.merge(blocks=3, t=t)
    held = [own[:, :WHOLE] for own in pair.held]
    for head in range(HEADS):
        halves = [own[head].split(SIZE, -1) for own in held]
        restored, stayed = minicache(*halves, t=t, retained=BLOCK)
        assert stayed == {*OUTLIERS}
        order = [i for i in range(WHOLE) if i not in stayed] + OUTLIERS
        for layer in (0, 1):
            wanted = torch.cat(restored[layer], -1)[order]
            torch.testing.assert_close(read[layer][head], wanted)
            # What is retained is as it was, to the bit.
            assert read[layer][head][-BLOCK:].equal(held[layer][head, OUTLIERS])


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("blocks", [3, 4])
def test_one_layers_bad_token_stays_its_own(
    bad: float, layer: int, blocks: int
) -> None:
    sound, pair = Pair(), Pair()
    pair.held[layer][0, 6] = bad
    wanted, found = sound.merge(blocks), pair.merge(blocks)
    assert found[1 - layer][0].isfinite().all()
    assert found[layer][1].equal(wanted[layer][1]), "the other head"
    place = WHOLE - BLOCK + OUTLIERS.index(6) if blocks == 3 else 6
    torch.testing.assert_close(found[1 - layer][0][place], pair.held[1 - layer][0, 6])
    # Retained, it is what it was; merged, nothing of it is left.
    token = found[layer][0][place]
    if blocks == 3:
        torch.testing.assert_close(token, pair.held[layer][0, 6], equal_nan=True)
    else:
        assert token.isfinite().all()
        assert float(token.norm()) < 1e-2
