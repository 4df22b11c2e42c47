"""Two layers' vectors as one: what MiniCache promises, piece by piece."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import slerp
from vllm_kvcompress.budget import absorbed, fit, merged, paired_tiers
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.ops.merge import Merged, merge, strangeness
from vllm_kvcompress.ops.select import select

Tensor = torch.Tensor
SHARES = [0.0, 0.3, 0.5, 0.6, 1.0]
GAMMA = 0.05


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _read(found: Merged) -> tuple[Tensor, Tensor]:
    """What the shallow layer reads, and the deep one."""
    return found.shared, found.shared * found.ratio[..., None]


def _angle(a: Tensor, b: Tensor) -> Tensor:
    return torch.cosine_similarity(a.double(), b.double(), -1).clamp(-1, 1).arccos()


@settings(deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from(SHARES),
    st.sampled_from([0.01, 1.0, 100.0]),
    st.sampled_from([8, 64]),
)
def test_as_in_the_paper(seed: int, t: float, scale: float, size: int) -> None:
    shallow, deep = _random(5, size, seed=seed), scale * _random(5, size, seed=~seed)
    found = merge(shallow, deep, t)
    read = _read(found)
    for i, (a, c) in enumerate(zip(shallow.tolist(), deep.tolist(), strict=True)):
        first, second, distance = slerp(a, c, t)
        for wanted, layer in zip((first, second), read, strict=True):
            error = math.dist(wanted, layer[i].tolist()) / math.hypot(*wanted)
            # Close to opposite vectors tell little about the arc between them.
            assert error < 1e-5 / math.sin(math.pi * distance) ** 2
        assert float(found.distance[i]) == pytest.approx(distance, abs=1e-3)


@pytest.mark.parametrize("t", SHARES)
def test_equal_directions_come_back(t: float) -> None:
    vectors = _random(4, 30, 16, seed=0)
    found = merge(vectors, 3 * vectors, t)
    for wanted, layer in zip((vectors, 3 * vectors), _read(found), strict=True):
        torch.testing.assert_close(layer, wanted)
    assert float(found.distance.max()) < 1e-3


@pytest.mark.parametrize("t", SHARES)
def test_both_lengths_stay_and_the_angle_is_split(t: float) -> None:
    shallow, deep = _random(4, 30, 16, seed=1), 0.2 * _random(4, 30, 16, seed=2)
    found = merge(shallow, deep, t)
    for wanted, layer in zip((shallow, deep), _read(found), strict=True):
        torch.testing.assert_close(layer.norm(dim=-1), wanted.norm(dim=-1))
    angle = _angle(shallow, deep)
    for share, layer in ((t, shallow), (1 - t, deep)):
        split = _angle(found.shared, layer)
        torch.testing.assert_close(split, share * angle, atol=2e-3, rtol=0)
    torch.testing.assert_close(found.distance.double(), angle / math.pi)


@pytest.mark.parametrize(("t", "exact"), [(0.0, 0), (1.0, 1)])
def test_one_layer_alone(t: float, exact: int) -> None:
    layers = _random(4, 30, 16, seed=1), _random(4, 30, 16, seed=2)
    read = _read(merge(*layers, t))
    torch.testing.assert_close(read[exact], layers[exact])
    assert float((read[1 - exact] - layers[1 - exact]).abs().max()) > 0.5


@pytest.mark.parametrize("t", SHARES)
def test_opposite_vectors(t: float) -> None:
    vectors = _random(100, 16, seed=3)
    found = merge(vectors, -2 * vectors, t)
    for factor, layer in zip((1, 2), _read(found), strict=True):
        lengths = factor * vectors.norm(dim=-1)
        torch.testing.assert_close(layer.norm(dim=-1), lengths)
    assert float(found.distance.min()) > 0.999


@pytest.mark.parametrize("t", SHARES)
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
def test_what_has_no_direction_takes_the_other(t: float, bad: float) -> None:
    good, poor = _random(5, 8, seed=4), _random(5, 8, seed=5)
    poor[2] = 0.0 if bad == 0.0 else poor[2].index_fill(0, torch.tensor(3), bad)
    for exact, layers in enumerate([(poor, good), (good, poor)]):
        found = merge(*layers, t)
        read = _read(found)
        torch.testing.assert_close(read[1 - exact][2], good[2])
        assert float(read[exact][2].norm()) < 1e-3 * float(good[2].norm())
        assert read[exact].isfinite().all()
        assert found.ratio.half().isfinite().all()
        assert found.distance[2] == 1
        others = [0, 1, 3, 4]
        alone = _read(merge(*(layer[others] for layer in layers), t))
        assert all(a[others].equal(b) for a, b in zip(read, alone, strict=True))


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_nothing_in_either_layer(bad: float) -> None:
    vectors = torch.full((2, 8), bad)
    found = merge(vectors, vectors, 0.6)
    for wanted, got in zip((0.0, 0.0), _read(found), strict=True):
        assert got.eq(wanted).all()
    assert found.distance.eq(0).all()


def test_rotation_commutes() -> None:
    """Keys may be merged as they are cached, rotated by their positions."""
    shallow, deep = _random(2, 40, 16, seed=6), _random(2, 40, 16, seed=7)
    angle = torch.arange(40)[:, None] * 10.0 ** -torch.arange(0, 1, 1 / 8)

    def rotate(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        turned = low * angle.cos() - high * angle.sin()
        return torch.cat([turned, high * angle.cos() + low * angle.sin()], -1)

    before, after = (
        merge(*layers, 0.6)
        for layers in ((shallow, deep), (rotate(shallow), rotate(deep)))
    )
    for plain, turned in zip(_read(before), _read(after), strict=True):
        torch.testing.assert_close(rotate(plain), turned, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(before.distance, after.distance)


# Retained tokens ----------------------------------------------------------------------

OUTLIERS = [0, 12, 77, 150]


def _distances(seed: int) -> Tensor:
    """Of 200 tokens that are alike in two layers, but for four that are not."""
    shallow = _random(2, 200, 32, seed=seed)
    deep = shallow + 0.8 * _random(2, 200, 32, seed=seed + 1)
    deep[:, OUTLIERS] = 0.05 * deep[:, OUTLIERS] - shallow[:, OUTLIERS]
    return merge(shallow, deep, 0.6).distance


@pytest.mark.parametrize("seed", range(5))
def test_outliers_are_retained(seed: int) -> None:
    distance = _distances(seed)
    assert select(strangeness(distance), 4).tolist() == [OUTLIERS] * 2
    for head, shares in zip(distance, strangeness(distance), strict=True):
        near = (shares >= 1 - GAMMA).nonzero()[:, 0].tolist()
        assert near == OUTLIERS
        # The rule as printed would keep the tokens that are most alike.
        low, high = head.min(), head.max()
        literal = (head < low + GAMMA * (high - low)).nonzero()[:, 0].tolist()
        assert literal
        assert not {*literal} & {*OUTLIERS}


def test_either_kind_of_distance_retains() -> None:
    keys, values = torch.zeros(1, 6), torch.zeros(1, 6)
    keys[0, 1], values[0, 4] = 0.5, 0.01
    assert select(strangeness(keys, values), 2).tolist() == [[1, 4]]
    assert strangeness(torch.ones(1, 6)).eq(0).all(), "no token is strange among equals"


# Bytes ------------------------------------------------------------------------------


@given(
    st.integers(1, 5000),
    st.integers(32, 5000),
    st.floats(0, 1),
    st.sampled_from([16, 32, 128]),
)
def test_a_pair_holds_what_the_formula_says(
    tokens: int, budget: int, retain: float, size: int
) -> None:
    kept = fit(tokens, budget, size)
    found = merged(kept, retain, borrows=True)
    apart = found.own_blocks
    assert merged(kept, retain, borrows=False).own_blocks == kept.kept_blocks
    assert found.kept_blocks == kept.kept_blocks
    assert 0 <= found.merged_blocks <= kept.kept_blocks
    if retain == 0:
        assert apart == 0
    elif kept.kept_blocks:
        assert apart == max(1, int(retain * kept.kept_blocks))
    assert merged(kept, 1.0, borrows=False) == kept


@given(st.integers(1, 5000), st.data(), st.sampled_from([16, 32]))
def test_whole_blocks_are_absorbed(held: int, data: st.DataObject, size: int) -> None:
    first = size * data.draw(st.integers(0, held // size))
    found = absorbed(held, first, size, borrows=True)
    assert found.own_blocks == first // size
    assert found.candidates
    assert found.candidates[0] == first
    assert found.candidates[1] - first == found.merged_blocks * size
    assert held - found.candidates[1] == found.tail_tokens < size
    assert found.end_block == found.kept_blocks == (held - found.tail_tokens) // size


def test_the_papers_ratio() -> None:
    """Half of 32 layers in pairs, 5 % apart: 3.05 of 4 parts stay."""
    config = KVCompressionConfig.from_dict({"method": "minicache"})
    pairs, tiers = config.pairs(32), config.tiers(32)
    assert pairs[0] == (16, 17)
    assert pairs[-1] == (30, 31)
    fits = config.tier_fits("minicache", tiers, 16_000, 16)
    blocks = sum(fits[tier].own_blocks * len(tier) for tier in tiers)
    assert blocks / (32 * 1000) == pytest.approx(3.05 / 4)


@given(st.integers(2, 80), st.data())
def test_tiers_of_pairs(layers: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, layers - 2))
    config = KVCompressionConfig.from_dict(
        {"method": "minicache", "start_layer": start}
    )
    pairs = config.pairs(layers)
    tiers = paired_tiers(layers, pairs)
    assert sorted(layer for tier in tiers for layer in tier) == list(range(layers))
    assert len(tiers) <= 8
    shallow, deep = ({pair[role] for pair in pairs} for role in (0, 1))
    parts = [[tier for tier in tiers if {*tier} & kind] for kind in (shallow, deep)]
    assert all(len(a) == len(b) for a, b in zip(*parts, strict=True))
    ordered = [[layer for tier in part for layer in tier] for part in parts]
    assert list(zip(*ordered, strict=True)) == pairs
    lone = [tier for tier in tiers if not {*tier} & (shallow | deep)]
    assert sum(map(len, lone)) == layers - 2 * len(pairs)
