"""YOCO in plain torch against its definition, token by token."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file

from vllm_kvcompress.models.configs import YocoConfig
from vllm_kvcompress.models.reference.yoco import YocoForCausalLM

Tensor = torch.Tensor
DIM, HIDDEN, VOCAB, WINDOW = 16, 24, 31, 3
MIXERS = pytest.mark.parametrize("window", [None, WINDOW], ids=["retention", "swa"])


def _config(window: int | None, **changes: Any) -> YocoConfig:
    # Heads of another size above than below, so that none is taken for the other.
    shapes = {"dim": DIM, "n_layers": 4, "hidden_dim": HIDDEN, "vocab_size": VOCAB}
    heads = {"n_self_heads": 2, "n_attn_heads": 4, "n_attn_kv_heads": 2}
    return YocoConfig(**{**shapes, **heads, "sliding_window": window, **changes})


def _model(window: int | None, **changes: Any) -> YocoForCausalLM:
    """Weights large enough that every part of the model is heard in the logits."""
    model = YocoForCausalLM(_config(window, **changes)).eval()
    random = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        drawn = 0.3 * torch.randn(weight.shape, generator=random)
        weight.data = 1 + drawn if name.endswith("norm.weight") else drawn
    model.tie_weights()
    return model.requires_grad_(False)


def _ids(tokens: int, batch: int = 1, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (batch, tokens), generator=random)


class _Slow:
    """The definition: one token after the other, one head after the other, float64."""

    def __init__(self, model: YocoForCausalLM) -> None:
        self.config = model.config
        self.weights = {k: w.double() for k, w in model.state_dict().items()}
        self.memory: dict[str, Any] = {}

    def logits(self, ids: list[int]) -> Tensor:
        return torch.stack([self._step(t, token) for t, token in enumerate(ids)])

    def _step(self, t: int, token: int) -> Tensor:
        half = self.config.n_layers // 2
        x = math.sqrt(DIM) * self.weights["embed_tokens.weight"][token]
        for i in range(half):
            name = f"self_decoder.layers.{i}"
            normed = self._norm(f"{name}.mixer_layer_norm", x)
            if self.config.sliding_window is None:
                x = x + self._retain(f"{name}.mixer", normed, t)
            else:
                x = x + self._slide(f"{name}.mixer", normed, t)
            x = x + self._feed(name, x)
        shared = self._norm("cross_decoder.kv_layer_norm", x)
        size = DIM // self.config.n_attn_heads
        keys = self._heads("cross_decoder.k_proj", shared, size, t)
        values = self._heads("cross_decoder.v_proj", shared, size)
        past = self.memory.setdefault("global", [])
        past.append((keys, values))
        for i in range(half):
            name = f"cross_decoder.layers.{i}"
            normed = self._norm(f"{name}.mixer_layer_norm", x)
            queries = self._heads(f"{name}.mixer.q_proj", normed, size, t)
            x = x + self._apply(f"{name}.mixer.out_proj", self._attend(queries, past))
            x = x + self._feed(name, x)
        return self._apply("output_projection", self._norm("layer_norm", x))

    def _apply(self, name: str, x: Tensor) -> Tensor:
        return self.weights[f"{name}.weight"] @ x

    def _rms(self, x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean() + self.config.norm_eps)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return self.weights[f"{name}.weight"] * self._rms(x)

    def _feed(self, name: str, x: Tensor) -> Tensor:
        normed = self._norm(f"{name}.final_layer_norm", x)
        inner = self._apply(f"{name}.ffn.fc1", normed)
        inner = inner * torch.sigmoid(inner) * self._apply(f"{name}.ffn.gate", normed)
        return self._apply(f"{name}.ffn.fc2", inner)

    def _heads(
        self, name: str, x: Tensor, size: int, turned_to: int | None = None
    ) -> list[Tensor]:
        heads = list(self._apply(name, x).split(size))
        if turned_to is None:
            return heads
        return [self._turn(head, turned_to) for head in heads]

    def _turn(self, head: Tensor, position: int) -> Tensor:
        pairs = len(head) // 2
        turned = torch.zeros_like(head)
        for i in range(pairs):
            exponent = i / (pairs - 1) if pairs > 1 else 0.0
            angle = position / self.config.rope_theta**exponent
            a, b = float(head[2 * i]), float(head[2 * i + 1])
            turned[2 * i] = a * math.cos(angle) - b * math.sin(angle)
            turned[2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
        return turned

    def _attend(self, queries: list[Tensor], past: list[Any]) -> Tensor:
        outputs = []
        for h, query in enumerate(queries):
            kv = h * len(past[0][0]) // len(queries)
            logits = [float(query @ keys[kv]) / len(query) ** 0.5 for keys, _ in past]
            votes = [math.exp(logit - max(logits)) for logit in logits]
            heard = zip(votes, past, strict=True)
            total = sum(vote * values[kv] for vote, (_, values) in heard)
            outputs.append(total / sum(votes))
        return torch.cat(outputs)

    def _slide(self, name: str, x: Tensor, t: int) -> Tensor:
        size = DIM // self.config.n_self_heads
        past = self.memory.setdefault(name, [])
        keys = self._heads(f"{name}.k_proj", x, size, t)
        past.append((keys, self._heads(f"{name}.v_proj", x, size)))
        queries = self._heads(f"{name}.q_proj", x, size, t)
        seen = [past[j] for j in range(t + 1) if j > t - self.config.sliding_window]
        return self._apply(f"{name}.out_proj", self._attend(queries, seen))

    def _retain(self, name: str, x: Tensor, t: int) -> Tensor:
        count = self.config.n_self_heads
        size = DIM // count
        q, k = (self._heads(f"{name}.{n}_proj", x, size, t) for n in "qk")
        v = self._heads(f"{name}.v_proj", x, size)
        gates = torch.sigmoid(self._apply(f"{name}.gt_proj", x)) ** (1 / 16)
        states = self.memory.setdefault(
            name, [torch.zeros(size, size).double()] * count
        )
        outputs = []
        for h in range(count):
            added = torch.outer(k[h] / math.sqrt(size), v[h])
            states[h] = float(gates[h]) * states[h] + added
            outputs.append(self._rms(q[h] @ states[h]))
        g = self._apply(f"{name}.g_proj", x)
        gated = g * torch.sigmoid(g) * torch.cat(outputs)
        return self._apply(f"{name}.out_proj", gated)


@MIXERS
@pytest.mark.parametrize("changes", [{}, {"n_layers": 2, "n_attn_heads": 8}])
def test_as_defined(window: int | None, changes: dict[str, int]) -> None:
    model, ids = _model(window, **changes), _ids(9, batch=2)
    logits = model(ids).logits
    assert logits.std() > 0.5
    for row, found in zip(ids.tolist(), logits, strict=True):
        wanted = _Slow(model).logits(row).float()
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)


@MIXERS
def test_early_exit_has_the_last_logits(window: int | None) -> None:
    model = _model(window)
    for tokens in (1, 2, WINDOW, 7, 40, 300):
        ids = _ids(tokens, batch=2)
        found, wanted = model.last_logits(ids), model(ids).logits[:, -1]
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@MIXERS
def test_early_exit_keeps_prompts_out_of_the_cross_layers(window: int | None) -> None:
    model = _model(window)
    seen: dict[str, int] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, inputs, __, name=name: seen.update({name: inputs[0].shape[1]})
        )
    model.last_logits(_ids(12))
    for i in range(2):
        assert seen[f"self_decoder.layers.{i}"] == 12
        assert seen[f"cross_decoder.layers.{i}"] == 1
    assert seen["cross_decoder.k_proj"] == seen["cross_decoder.v_proj"] == 12
    assert seen["output_projection"] == 1


def _influence(model: YocoForCausalLM, tokens: int) -> Tensor:
    """``[i, j]``: whether output i of the self-decoder hears of token j."""
    x = torch.randn(1, tokens, DIM, generator=torch.Generator().manual_seed(0))
    before = model.self_decoder(x)
    heard = torch.zeros(tokens, tokens, dtype=torch.bool)
    for j in range(tokens):
        changed = x.clone()
        changed[:, j] = changed[:, j].flip(-1)
        difference = (model.self_decoder(changed) - before).abs().amax(-1)[0]
        assert ((difference < 1e-6) | (difference > 1e-4)).all()
        heard[:, j] = difference > 1e-4
    return heard


@pytest.mark.parametrize("window", [1, 2, WINDOW, 8, 9])
def test_one_layer_hears_its_window(window: int) -> None:
    found = _influence(_model(window, n_layers=2), 8)
    wanted = torch.tensor([[i - window < j <= i for j in range(8)] for i in range(8)])
    assert torch.equal(found, wanted)


def test_retention_hears_all_of_the_past() -> None:
    found = _influence(_model(None, n_layers=2), 8)
    assert torch.equal(found, torch.ones(8, 8, dtype=torch.bool).tril())


def test_a_window_as_long_as_the_sequence_is_full_attention() -> None:
    ids = _ids(WINDOW + 4)
    full, near = _model(1000), _model(WINDOW)
    short = ids[:, :WINDOW]
    torch.testing.assert_close(near(short).logits, full(short).logits)
    difference = (near(ids).logits - full(ids).logits).abs().amax(-1)[0]
    assert (difference[:WINDOW] < 1e-5).all()
    assert (difference[WINDOW:] > 1e-3).all()


@MIXERS
def test_later_tokens_and_other_rows_are_not_heard(window: int | None) -> None:
    model, ids = _model(window), _ids(10, batch=3)
    logits = model(ids).logits
    for tokens in (1, 4, 9):
        prefix = model(ids[1:2, :tokens]).logits
        torch.testing.assert_close(prefix, logits[1:2, :tokens], atol=1e-5, rtol=1e-5)


@MIXERS
def test_it_learns(window: int | None) -> None:
    torch.manual_seed(0)
    model = YocoForCausalLM(_config(window))
    ids = _ids(20, batch=2)
    labels = ids.clone()
    labels[0, :5] = -100
    first = model(ids, labels=labels)
    chances = first.logits.log_softmax(-1)
    wanted = [
        -chances[row, t, ids[row, t + 1]]
        for row in range(2)
        for t in range(19)
        if row == 1 or t + 1 >= 5
    ]
    torch.testing.assert_close(first.loss, torch.stack(wanted).mean())
    assert model(ids).loss is None
    first.loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.3 * first.loss


def _shapes(window: int | None) -> dict[str, list[int]]:
    """Every parameter of the authors' checkpoints."""
    square, norm = [DIM, DIM], [DIM]
    found = {"embed_tokens": [VOCAB, DIM], "output_projection": [VOCAB, DIM]}
    found |= {"layer_norm": norm, "cross_decoder.kv_layer_norm": norm}
    found |= {f"cross_decoder.{n}_proj": [DIM // 2, DIM] for n in "kv"}
    for decoder, mixer in (
        ("self_decoder", ["q", "k", "v", "out"] + ["g"] * (window is None)),
        ("cross_decoder", ["q", "out"]),
    ):
        for i in range(2):
            name = f"{decoder}.layers.{i}"
            found |= {f"{name}.mixer.{n}_proj": square for n in mixer}
            if decoder == "self_decoder" and window is None:
                found[f"{name}.mixer.gt_proj"] = [2, DIM]
            found |= {f"{name}.ffn.{n}": [HIDDEN, DIM] for n in ("fc1", "gate")}
            found[f"{name}.ffn.fc2"] = [DIM, HIDDEN]
            found[f"{name}.mixer_layer_norm"] = norm
            found[f"{name}.final_layer_norm"] = norm
    return {f"{name}.weight": shape for name, shape in found.items()}


@MIXERS
@pytest.mark.parametrize("tied", [False, True])
def test_saved_under_the_authors_names(
    window: int | None, tied: bool, tmp_path: Path
) -> None:
    model = _model(window, tie_word_embeddings=tied)
    names = _shapes(window)
    assert {k: list(w.shape) for k, w in model.state_dict().items()} == names
    model.save_pretrained(tmp_path)
    if tied:
        del names["output_projection.weight"]
    saved = load_file(tmp_path / "model.safetensors")
    assert {k: list(w.shape) for k, w in saved.items()} == names
    loaded = YocoForCausalLM.from_pretrained(tmp_path).eval()
    written, read = (each.config.to_diff_dict() for each in (model, loaded))
    kind = "Yoco" if window else "YocoRetention"
    assert read.pop("architectures") == [f"{kind}ForCausalLM"]
    written.pop("architectures")
    assert read == written
    assert loaded.config.sliding_window == window
    same = loaded.output_projection.weight is loaded.embed_tokens.weight
    assert same == tied
    ids = _ids(8)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@MIXERS
def test_half_precision_is_close(window: int | None) -> None:
    model, ids = _model(window), _ids(12)
    wanted = model(ids).logits
    found = model.bfloat16()(ids).logits
    assert found.dtype == torch.bfloat16
    assert torch.cosine_similarity(found.float(), wanted, -1).min() > 0.99


BAD = [
    ({"n_layers": 3}, "n_layers=3 must be even"),
    ({"n_layers": 0}, "n_layers=0 must be even and at least 2"),
    ({"n_self_heads": 3}, "n_self_heads=3 does not divide dim=16"),
    ({"n_self_heads": 16}, "n_self_heads=16 does not divide dim=16 into even"),
    ({"n_attn_heads": 16}, "n_attn_heads=16 does not divide dim=16 into even"),
    ({"n_attn_kv_heads": 3}, "n_attn_kv_heads=3 does not divide n_attn_heads=4"),
    ({"sliding_window": 0}, "sliding_window=0 must be at least 1"),
]


@pytest.mark.parametrize(("changes", "sentence"), BAD)
def test_bad_configurations_are_refused(changes: dict[str, int], sentence: str) -> None:
    # transformers wraps what a configuration raises while it is made.
    with pytest.raises(StrictDataclassError, match=sentence) as wrapped:
        _config(None, **changes)
    assert isinstance(wrapped.value.__cause__, ValueError)
    config = _config(None)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=sentence):
        YocoForCausalLM(config)


@pytest.mark.parametrize("shape", [(5,), (1, 0), (1, 2, 3)])
def test_other_inputs_are_refused(shape: tuple[int, ...]) -> None:
    model, ids = _model(None), torch.zeros(shape, dtype=torch.long)
    for call in (model, model.last_logits):
        with pytest.raises(ValueError, match="input_ids must be"):
            call(ids)
