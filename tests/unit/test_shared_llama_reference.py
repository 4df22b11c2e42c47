"""The references of Llamas that share KV, against loops that know nothing of them."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_kvcompress.models.reference.llama import (
    ClaLlamaForCausalLM,
    LCKVLlamaForCausalLM,
    OptLlamaForCausalLM,
)

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": None,
}
STRINGS = [
    "0_1_2_3",
    "0_0_2_2_4",
    "0s_1s_2_2",
    "0_4_4_4_4_5",
    "3_3_3_3",
    "0_2_2_3_2",
    "0_3s_3_3_4",
    "0_3s_3s_3s_4s",
    "0_3_3_3_7_7_7_7",
    "0_3_5_3_4_5_6",
    "2_1_4_3_4",
]
CLA = [
    {"cla_share_factor": 1},
    {"cla_share_factor": 2},
    {"cla_share_factor": 3},
    {"cla_map": "keep_ends"},
    {"cla_map": "dense_back"},
    {"use_qk_norm": True},
    {"use_qk_norm": True, "cla_share_factor": 3},
]


def make(model, layers, kv_heads=2, **settings):
    """A model whose weights are large enough for attention to choose."""
    config = model.config_class(
        num_hidden_layers=layers, num_key_value_heads=kv_heads, **SIZES, **settings
    )
    made = model(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, weight in made.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = 1 + 0.3 * noise if "norm" in name else 0.2 * noise
    return made


def lckv(string, **settings):
    layers = len(string.split("_"))
    settings = {"sliding_window": 4, **settings}
    return make(LCKVLlamaForCausalLM, layers, layer_types=string, **settings)


def text(tokens=10, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(SIZES["vocab_size"], (batch, tokens), generator=generator)


def logits(model, tokens, **options):
    with torch.no_grad():
        return model(tokens, **options).logits


def close(found, wanted):
    atol = 1e-5 * wanted.abs().max().item()
    return torch.testing.assert_close(found, wanted, atol=atol, rtol=0)


# A loop of its own: one sequence, one token, one head, no module but weights.


def rms(vector, weight, eps):
    return vector / torch.sqrt((vector * vector).mean() + eps) * weight


def rotate(vector, position, theta):
    half = len(vector) // 2
    turned = vector.clone()
    for i in range(half):
        angle = position * theta ** (-i / half)
        low, high = vector[i], vector[i + half]
        turned[i] = low * math.cos(angle) - high * math.sin(angle)
        turned[i + half] = high * math.cos(angle) + low * math.sin(angle)
    return turned


def slow_loop(model, tokens, owners, masked, sliding=None):
    """Logits ``[tokens, vocabulary]`` of one sequence."""
    config, weights = model.config, dict(model.named_parameters())
    theta, eps = config.rope_parameters["rope_theta"], config.rms_norm_eps
    heads, kv_heads, dim = 4, config.num_key_value_heads, 8
    stored = {layer: [] for layer in owners}  # one (keys, values) per token
    rows = []
    for t, token in enumerate(tokens.tolist()):
        x = weights["model.embed_tokens.weight"][token]
        for layer, owner in enumerate(owners):

            def linear(name, vector, layer=layer):
                found = f"model.layers.{layer}.{name}"
                bias = weights.get(f"{found}.bias", 0)
                return weights[f"{found}.weight"] @ vector + bias

            def norm(name, vector, layer=layer):
                return rms(vector, weights[f"model.layers.{layer}.{name}.weight"], eps)

            h = norm("input_layernorm", x)
            if layer in stored:
                keys = linear("self_attn.k_proj", h).view(kv_heads, dim)
                values = linear("self_attn.v_proj", h).view(kv_heads, dim)
                stored[layer].append(([rotate(k, t, theta) for k in keys], values))
            first = 0 if not (sliding and sliding[layer]) else t - 4 + 1
            seen = range(max(0, first), t if masked[layer] else t + 1)
            out = []
            for head, q in enumerate(linear("self_attn.q_proj", h).view(heads, dim)):
                group = head // (heads // kv_heads)
                q = rotate(q, t, theta)
                if getattr(config, "use_qk_norm", False):
                    q = norm("self_attn.query_layernorm", q)
                scores, read = [], []
                for s in seen:
                    key = stored[owner][s][0][group]
                    if getattr(config, "use_qk_norm", False):
                        key = norm("self_attn.key_layernorm", key)
                    scores.append(q @ key / math.sqrt(dim))
                    read.append(stored[owner][s][1][group])
                total = torch.zeros(dim)
                if scores:
                    shares = torch.stack(scores).softmax(0)
                    total = sum(a * v for a, v in zip(shares, read, strict=True))
                out.append(total)
            x = x + linear("self_attn.o_proj", torch.cat(out))
            h = norm("post_attention_layernorm", x)
            gate = torch.nn.functional.silu(linear("mlp.gate_proj", h))
            x = x + linear("mlp.down_proj", gate * linear("mlp.up_proj", h))
        x = rms(x, weights["model.norm.weight"], eps)
        rows.append(weights["lm_head.weight"] @ x)
    return torch.stack(rows)


def maps(string, everywhere):
    """Owners, masks and windows of a string, read once more."""
    entries = string.split("_")
    owners = [int(entry.strip("s")) for entry in entries]
    masked = [everywhere or owner > i for i, owner in enumerate(owners)]
    return owners, masked, ["s" in entry for entry in entries]


@torch.no_grad()
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("string", STRINGS)
def test_lckv_follows_its_definition(string, everywhere):
    model = lckv(string, force_nodiag=everywhere, attention_bias=True)
    tokens = text(7, batch=1)
    wanted = slow_loop(model, tokens[0], *maps(string, everywhere))
    close(model.sequential(tokens)[0], wanted)
    close(logits(model, tokens, passes=7)[0], wanted)


@torch.no_grad()
@pytest.mark.parametrize("settings", CLA, ids=str)
def test_cla_follows_its_definition(settings):
    model = make(ClaLlamaForCausalLM, 5, **settings)
    tokens = text(6, batch=1)
    owners = model.config.layer_map.owners
    wanted = slow_loop(model, tokens[0], owners, [False] * 5)
    close(model.sequential(tokens)[0], wanted)
    close(logits(model, tokens)[0], wanted)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("string", STRINGS)
def test_enough_passes_equal_the_sequence(string, everywhere, kv_heads):
    model = lckv(string, force_nodiag=everywhere, kv_heads=kv_heads)
    for tokens in (1, 2, 13):
        prompt = text(tokens)
        wanted = model.sequential(prompt)
        close(logits(model, prompt, passes=tokens), wanted)
        close(logits(model, prompt, passes=tokens + 3), wanted)


def test_first_code_base_equals_force_nodiag():
    old = make(OptLlamaForCausalLM, 5, layer_types="0_1_1_2_0", target_layer=-2)
    new = lckv("0_3_3_3_4", force_nodiag=True)
    prompt = text()
    assert torch.equal(old.sequential(prompt), new.sequential(prompt))
    close(logits(old, prompt, passes=10), old.sequential(prompt))


@pytest.mark.parametrize("string", ["0_4_4_4_4_5", "3_3_3_3", "0_3_5_3_4_5_6"])
def test_as_many_tokens_are_exact_as_passes(string):
    model, prompt = lckv(string), text(20)
    wanted = model.sequential(prompt)
    for passes in (1, 2, 5, 9):
        found = logits(model, prompt, passes=passes)
        close(found[:, :passes], wanted[:, :passes])
        assert (found - wanted)[:, passes:].abs().max() > 1e-3


def attention_outputs(model, run):
    """What enters each layer's o_proj."""
    found = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, i=i: found.append((i, args[0].detach()))
        )
        for i, layer in enumerate(model.model.layers)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return found


def test_first_token_reads_zeros_where_masked():
    model, prompt = lckv("0_4_4_4_4_5"), text()
    for run in (lambda: model.sequential(prompt[:, :1]), lambda: model(prompt)):
        outputs = attention_outputs(model, run)
        assert {layer for layer, _ in outputs} == set(range(6))
        for layer, output in outputs:
            assert (output[:, 0] == 0).all() == (layer in (1, 2, 3)), layer


def test_window_without_the_current_token_can_be_empty():
    model, prompt = lckv("0_3s_3_3", sliding_window=1), text()
    outputs = attention_outputs(model, lambda: model(prompt, passes=10))
    assert all((output == 0).all() for layer, output in outputs if layer == 1)
    close(logits(model, prompt, passes=10), model.sequential(prompt))


def test_no_token_reads_what_it_wrote_itself():
    """Layer 1 reads what layer 4 wrote: of the token before, never of itself."""
    model, prompt = lckv("0_4_4_4_4_5"), text(8, batch=1)
    reads = [prompt.shape[1] - 1, prompt.shape[1] - 2]
    changes = []
    for token in reads:

        def alter(_, args, output, token=token):
            output = output.clone()
            output[:, token] += 3
            return output

        def first_reader(alter=alter):
            values = model.model.layers[4].self_attn.v_proj
            handle = values.register_forward_hook(alter)
            run = attention_outputs(model, lambda: model(prompt, passes=8))
            handle.remove()
            return [output for layer, output in run if layer == 1][-1][:, -1]

        plain = attention_outputs(model, lambda: model(prompt, passes=8))
        plain = [output for layer, output in plain if layer == 1][-1][:, -1]
        changes.append((first_reader() - plain).abs().max().item())
    assert changes[0] == 0
    assert changes[1] > 1e-3


@pytest.mark.parametrize(
    "settings, passes",
    [
        ({}, [False] * 7 + [True] * 2),
        ({"sliding_window": 1}, [False] * 7 + [True] * 2),
        ({"force_nodiag": True, "forward_passes": 1}, [False, True, True]),
        ({"forward_passes": 0, "backward_passes": 0}, [True]),
        ({"forward_passes": 3, "backward_passes": 0}, [False, False, True]),
        ({"forward_passes": 0, "backward_passes": 3}, [True] * 3),
    ],
)
def test_gradients_are_finite_and_of_the_last_passes_alone(settings, passes):
    model = lckv("0_3s_3_3_4", **settings).train()
    calls = []
    model.model.layers[1].mlp.register_forward_hook(
        lambda *_: calls.append(torch.is_grad_enabled())
    )
    model(text(), labels=text()).loss.backward()
    assert calls == passes
    for name, weight in model.named_parameters():
        if weight.grad is None:
            # Layer 1 may see nothing, and then it has nothing to choose.
            blind = "sliding_window" in settings or len(passes) == 1
            assert blind and ".layers." in name
        else:
            assert weight.grad.isfinite().all(), name


def test_passes_are_at_most_tokens():
    model, prompt = lckv("0_2_2"), text(4)
    calls = attention_outputs(model, lambda: model(prompt))
    assert [layer for layer, _ in calls] == [0, *[1, 2] * 4]
    wanted = model.sequential(prompt)
    close(logits(model, prompt), wanted)
    assert (logits(model, prompt, passes=2) - wanted).abs().max() > 1e-3


def test_ordinary_string_is_a_llama():
    model = lckv("0_1_2_3")
    plain = LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=4, num_key_value_heads=2, **SIZES)
    )
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, text()), logits(plain.eval(), text()))
    one = make(ClaLlamaForCausalLM, 4, cla_share_factor=1)
    assert torch.equal(logits(one, text()), logits(plain, text()))


def test_strings_that_read_back_take_one_pass():
    model, prompt = lckv("0s_1s_2_2_2"), text()
    calls = attention_outputs(model, lambda: model(prompt))
    assert [layer for layer, _ in calls] == [0, 1, 2, 3, 4]
    cla = make(ClaLlamaForCausalLM, 5)
    cla.load_state_dict(lckv("0_0_2_2_4").state_dict())
    assert torch.equal(logits(cla, prompt), logits(lckv("0_0_2_2_4"), prompt))


def test_only_writers_have_keys_and_values():
    for string, owners in {"0_4_4_4_4_5": {0, 4, 5}, "0_0_2_2_4": {0, 2, 4}}.items():
        names = lckv(string).state_dict()
        for part in ("k_proj", "v_proj"):
            found = {int(n.split(".")[2]) for n in names if f".{part}." in n}
            assert found == owners
        assert sum(".q_proj." in name for name in names) == len(string.split("_"))


def test_dialects_differ():
    prompt = text()
    new, old = lckv("0_4_4_4_4_5"), lckv("0_4_4_4_4_5", force_nodiag=True)
    assert (new.sequential(prompt) - old.sequential(prompt)).abs().max() > 1e-2


def test_batch_of_unequal_lengths():
    model, prompt = lckv("0_4_4_4_4_5"), text(12)
    prompt[0, 7:] = 0  # padding
    found = logits(model, prompt, passes=12)
    close(found[:1, :7], logits(model, prompt[:1, :7], passes=7))
    close(found[1:], logits(model, prompt[1:], passes=12))


def test_key_norms_fold_into_queries():
    """Keys normed without a weight can be shared; the weight goes to the query."""
    model = make(ClaLlamaForCausalLM, 5, use_qk_norm=True, cla_share_factor=3)
    prompt = text()
    wanted = logits(model, prompt)
    for layer in model.model.layers:
        attention = layer.self_attn
        weight = attention.key_layernorm.weight.data
        attention.query_layernorm.weight.data *= weight
        attention.key_layernorm.weight.data = torch.ones_like(weight)
    close(logits(model, prompt), wanted)


def test_readers_have_norms_of_their_own():
    model = make(ClaLlamaForCausalLM, 4, use_qk_norm=True)
    before = logits(model, text())
    model.model.layers[1].self_attn.key_layernorm.weight.data[0] += 1
    assert (logits(model, text()) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    "model",
    [
        lckv("0_3s_3_3_4", force_nodiag=True),
        make(ClaLlamaForCausalLM, 4, use_qk_norm=True, attention_bias=True),
        make(OptLlamaForCausalLM, 4, layer_types="0_1_2_0", target_layer=2),
        make(ClaLlamaForCausalLM, 4, tie_word_embeddings=True),
    ],
    ids=lambda model: type(model).__name__,
)
def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.layer_map == model.config.layer_map
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(loaded, text()), logits(model, text()))


def test_new_weights_are_drawn_as_those_of_a_llama():
    config = LCKVLlamaForCausalLM.config_class(
        num_hidden_layers=3, num_key_value_heads=2, layer_types="0_2_2", **SIZES
    )
    for layer in LCKVLlamaForCausalLM(config).model.layers:
        assert 0.01 < layer.self_attn.q_proj.weight.std() < 0.03


def test_no_pass_is_refused():
    with pytest.raises(ValueError, match="passes=0"):
        lckv("0_2_2")(text(), passes=0)
