"""Gated retention: three forms of one definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.ops.retention import (
    gate_decay,
    retention_chunkwise,
    retention_parallel,
    retention_recurrent,
)

Tensor = torch.Tensor
HEADS, SIZE = 2, 4
LENGTHS = st.integers(0, 40)
SEEDS = st.integers(0, 1000)
# Means of the gate's logits: nearly all is forgotten, half of it, hardly anything.
GATES = st.sampled_from([-100.0, 0.0, 8.0])


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _inputs(tokens: int, seed: int = 0, gate: float = 0.0) -> tuple[Tensor, ...]:
    vectors = _random(3, tokens, HEADS, SIZE, seed=seed)
    gates = gate + 4 * _random(tokens, HEADS, seed=~seed)
    return (*vectors, gate_decay(gates))


def _state(seed: int | None = None) -> Tensor:
    if seed is None:
        return torch.zeros(HEADS, SIZE, SIZE)
    return _random(HEADS, SIZE, SIZE, seed=seed)


def _close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), SEEDS, GATES)
def test_every_token_hears_the_past_through_the_decays_between(
    tokens: int, seed: int, gate: float
) -> None:
    q, k, v, decay = (part.tolist() for part in _inputs(tokens, seed, gate))
    outputs = retention_parallel(*_inputs(tokens, seed, gate))
    for i in range(tokens):
        for h in range(HEADS):
            wanted = [0.0] * SIZE
            for j in range(i + 1):
                heard = sum(a * b for a, b in zip(q[i][h], k[j][h], strict=True))
                heard *= math.exp(sum(decay[t][h] for t in range(j + 1, i + 1)))
                wanted = [w + heard * x for w, x in zip(wanted, v[j][h], strict=True)]
            _close(outputs[i, h], torch.tensor(wanted))


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(1, 17), SEEDS, GATES)
def test_three_forms_are_equal(tokens: int, chunk: int, seed: int, gate: float) -> None:
    inputs = _inputs(tokens, seed, gate)
    wanted, last = retention_recurrent(*inputs, _state())
    found, state = retention_chunkwise(*inputs, _state(), chunk)
    _close(found, wanted)
    _close(state, last)
    _close(retention_parallel(*inputs), wanted)


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.lists(LENGTHS, max_size=3), st.integers(1, 17), SEEDS, GATES)
def test_a_state_stands_for_the_past(
    tokens: int, cuts: list[int], chunk: int, seed: int, gate: float
) -> None:
    inputs, start = _inputs(tokens, seed, gate), _state(seed)
    wanted, last = retention_recurrent(*inputs, start)
    edges = sorted({0, tokens, *(min(cut, tokens) for cut in cuts)})
    found, state = [wanted[:0]], start
    for first, end in zip(edges, edges[1:], strict=False):
        part = [tensor[first:end] for tensor in inputs]
        outputs, state = retention_chunkwise(*part, state, chunk)
        found.append(outputs)
    _close(torch.cat(found), wanted)
    _close(state, last)
    assert torch.equal(start, _state(seed))


def test_decoding_goes_on_from_a_prompt() -> None:
    inputs = _inputs(600)
    wanted = retention_parallel(*inputs)
    prompt = [part[:595] for part in inputs]
    outputs, state = retention_chunkwise(*prompt, _state())
    rest, _ = retention_recurrent(*(part[595:] for part in inputs), state)
    _close(torch.cat([outputs, rest]), wanted)


def test_no_tokens_leave_the_state() -> None:
    for form in (retention_recurrent, retention_chunkwise):
        outputs, state = form(*_inputs(0), _state(1))
        assert outputs.shape == (0, HEADS, SIZE)
        assert torch.equal(state, _state(1))


def test_without_decay_it_is_linear_attention() -> None:
    *vectors, _ = _inputs(50)
    open_gates = gate_decay(torch.full((50, HEADS), 1e4))
    q, k, v = (part.transpose(0, 1) for part in vectors)
    wanted = ((q @ k.mT).tril() @ v).transpose(0, 1)
    _close(retention_chunkwise(*vectors, open_gates, _state(), 16)[0], wanted)
    _close(retention_parallel(*vectors, open_gates), wanted)


@pytest.mark.parametrize("gate", [-20.0, 0.0, 3.0])
def test_a_token_fades_by_its_decay(gate: float) -> None:
    # One token speaks, then nothing: what is heard shrinks by gamma with every token.
    gates = torch.full((20, HEADS), gate)
    ones = torch.ones(20, HEADS, SIZE)
    spoken = torch.zeros_like(ones)
    spoken[0] = 1
    gamma = (1 / (1 + math.exp(-gate))) ** (1 / 16)
    wanted = torch.tensor([SIZE * gamma**t for t in range(20)])
    wanted = wanted[:, None, None].expand_as(ones)
    inputs = (ones, spoken, ones, gate_decay(gates))
    _close(retention_parallel(*inputs), wanted)
    for form in (retention_recurrent, retention_chunkwise):
        outputs, state = form(*inputs, _state())
        _close(outputs, wanted)
        _close(state, torch.full_like(state, gamma**19))


@pytest.mark.parametrize("gate", [-1e4, -100.0, 100.0])
def test_long_sequences_stay_finite(gate: float) -> None:
    inputs = _inputs(2000, gate=gate)
    wanted, last = retention_recurrent(*inputs, _state(0))
    found, state = retention_chunkwise(*inputs, _state(0))
    for part in (found, state, retention_parallel(*inputs)):
        assert part.isfinite().all()
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(state, last, atol=1e-3, rtol=1e-4)


def test_strong_decays_do_not_swallow_the_weak_ones_after_them() -> None:
    *vectors, decay = _inputs(400)
    decay[:100], decay[100:] = -100.0, -1e-4
    wanted, _ = retention_recurrent(*vectors, decay, _state())
    found, _ = retention_chunkwise(*vectors, decay, _state(), 400)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    parallel = retention_parallel(*vectors, decay)
    torch.testing.assert_close(parallel, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gate", [-1e4, 0.0])
def test_gradients_are_equal_and_finite(gate: float) -> None:
    def gradients(form: str) -> tuple[Tensor, ...]:
        inputs = [part.requires_grad_() for part in _inputs(30, gate=gate)]
        state = _state(2).requires_grad_()
        if form == "recurrent":
            outputs, last = retention_recurrent(*inputs, state)
        else:
            outputs, last = retention_chunkwise(*inputs, state, 8)
        loss = outputs.sin().sum() + last.cos().sum()
        return torch.autograd.grad(loss, (*inputs, state))

    pairs = zip(gradients("chunkwise"), gradients("recurrent"), strict=True)
    for found, wanted in pairs:
        assert found.isfinite().all()
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_batch_is_its_sequences() -> None:
    rows = [_inputs(21, seed) for seed in range(3)]
    starts = [_state(seed) for seed in range(3)]
    batch = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    parallel = retention_parallel(*batch)
    found, states = retention_chunkwise(*batch, torch.stack(starts), 8)
    slow, slow_states = retention_recurrent(*batch, torch.stack(starts))
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        wanted, last = retention_recurrent(*row, start)
        for outputs, state in ((found, states), (slow, slow_states)):
            _close(outputs[i], wanted)
            _close(state[i], last)
        _close(parallel[i], retention_parallel(*row))


def test_float32_inside() -> None:
    *vectors, decay = _inputs(50)
    low = [part.bfloat16() for part in vectors]
    wanted, last = retention_recurrent(*(part.float() for part in low), decay, _state())
    outputs, state = retention_chunkwise(*low, decay, _state(), 16)
    assert outputs.dtype == state.dtype == torch.float32
    _close(outputs, wanted)
    _close(state, last)
    _close(retention_parallel(*low, decay), wanted)


def test_a_chunk_has_tokens() -> None:
    with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
        retention_chunkwise(*_inputs(3), _state(), 0)
