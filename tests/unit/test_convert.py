"""Models that share KV, made out of ordinary Llamas by `kvcompress convert`."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from vllm_kvcompress.models.convert import sandwich
from vllm_kvcompress.models.reference.llama import (
    ClaLlamaForCausalLM,
    LCKVLlamaForCausalLM,
)
from vllm_kvcompress.models.reference.yoco import YocoForCausalLM
from vllm_kvcompress.tools.main import main

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def dense(layers=6, config=LlamaConfig, model=LlamaForCausalLM, **settings):
    torch.manual_seed(0)
    made = model(config(num_hidden_layers=layers, **{**SIZES, **settings})).eval()
    for name, weight in made.named_parameters():
        weight.data = torch.randn_like(weight) * 0.2 + ("norm" in name)
    return made


@pytest.fixture
def source(tmp_path):
    """The folder of a Llama of six layers."""
    dense().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def convert(source, to, *flags):
    """Convert, and return the new folder."""
    folder = source.parent / "-".join(["new", to, *flags])
    assert main(["convert", "--to", to, *flags, str(source), str(folder)]) == 0
    return folder


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


TOKENS = torch.arange(20).view(2, 10)


@pytest.mark.parametrize(
    "to, flags, owners",
    [
        ("cla2", (), [0, 0, 2, 2, 4, 4]),
        ("cla4", (), [0, 0, 0, 0, 4, 4]),
        ("cla2", ("--cla-map", "keep_ends"), [0, 1, 1, 3, 3, 5]),
        ("cla", ("--layer-types", "2_1_1_0_2_1"), [0, 0, 0, 3, 4, 4]),
        ("lckv-w2", (), [0, 4, 4, 4, 4, 5]),
        ("lckv-w0", (), [5] * 6),
        ("lckv-w3", (), [0, 1, 4, 4, 4, 5]),
        ("lckv", ("--layer-types", "0_3_3_3_4s_4s"), [0, 3, 3, 3, 4, 4]),
    ],
)
def test_writers_get_the_mean_of_what_their_readers_had(source, to, flags, owners):
    folder = convert(source, to, *flags)
    old, new = load_file(source / "model.safetensors"), {}
    new = load_file(folder / "model.safetensors")
    kv = [name for name in old if ".k_proj" in name or ".v_proj" in name]
    for name in old.keys() - kv:
        assert torch.equal(new.pop(name), old[name]), name
    for owner in set(owners):
        for part in ("k_proj", "v_proj"):
            readers = [i for i, read in enumerate(owners) if read == owner]
            path = "model.layers.{}.self_attn." + part + ".weight"
            wanted = sum(old[path.format(i)] for i in readers) / len(readers)
            found = new.pop(path.format(owner))
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert not new
    kind = ClaLlamaForCausalLM if to.startswith("cla") else LCKVLlamaForCausalLM
    model = kind.from_pretrained(folder)
    assert model.config.layer_map.owners == tuple(owners)
    assert config_of(folder)["architectures"] == [kind.__name__]
    assert config_of(folder)["model_type"] == kind.config_class.model_type
    assert logits(model, TOKENS).isfinite().all()


@pytest.mark.parametrize(
    "to, flags, kind",
    [
        ("cla1", (), ClaLlamaForCausalLM),
        ("lckv", ("--layer-types", "0_1_2_3_4_5"), LCKVLlamaForCausalLM),
    ],
)
def test_nothing_shared_is_the_same_model(source, to, flags, kind):
    new = kind.from_pretrained(convert(source, to, *flags)).eval()
    old = LlamaForCausalLM.from_pretrained(source).eval()
    assert torch.equal(logits(new, TOKENS), logits(old, TOKENS))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_yoco_of_two_layers_is_the_same_model(tmp_path, kv_heads, tied):
    """One layer in the upper half shares nothing, so only the names may differ."""
    source = tmp_path / "source"
    old = dense(2, num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    old.save_pretrained(source)
    folder = convert(source, "yoco")
    new = YocoForCausalLM.from_pretrained(folder).eval()
    assert config_of(folder)["architectures"] == ["YocoForCausalLM"]
    assert new.config.sliding_window == 1024
    torch.testing.assert_close(logits(new, TOKENS), logits(old, TOKENS))


def test_yoco_shares_the_mean_of_the_upper_half(source):
    old = load_file(source / "model.safetensors")
    new = load_file(convert(source, "yoco", "--window", "7") / "model.safetensors")
    norms = [old[f"model.layers.{i}.input_layernorm.weight"] for i in (3, 4, 5)]
    found = new["cross_decoder.kv_layer_norm.weight"]
    torch.testing.assert_close(found, sum(norms) / 3)
    values = [old[f"model.layers.{i}.self_attn.v_proj.weight"] for i in (3, 4, 5)]
    torch.testing.assert_close(new["cross_decoder.v_proj.weight"], sum(values) / 3)
    assert config_of(source.parent / "new-yoco---window-7")["sliding_window"] == 7


def test_yoco_with_retention_has_gates(source):
    folder = convert(source, "yoco", "--retention")
    assert config_of(folder)["sliding_window"] is None
    model = YocoForCausalLM.from_pretrained(folder)
    mixer = model.self_decoder.layers[0].mixer
    assert (mixer.gt_proj.weight == 0).all()
    assert 0.01 < mixer.g_proj.weight.std() < 0.03
    assert logits(model, TOKENS).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to", ["cla2", "lckv-w2", "yoco", "yoco --retention"])
def test_dtype_is_kept(source, to, dtype):
    LlamaForCausalLM.from_pretrained(source).to(dtype).save_pretrained(source)
    folder = convert(source, *to.split())
    weights = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {dtype}
    assert f"torch.{config_of(folder)['dtype']}" == str(dtype)


def test_checkpoint_in_several_files(source, tmp_path):
    whole = convert(source, "cla2")
    parts = tmp_path / "parts"
    LlamaForCausalLM.from_pretrained(source).save_pretrained(
        parts, max_shard_size="40KB"
    )
    assert len(list(parts.glob("*.safetensors"))) > 1
    found = load_file(convert(parts, "cla3").parent / "new-cla3" / "model.safetensors")
    assert found.keys() != load_file(whole / "model.safetensors").keys()
    (tmp_path / "again").mkdir()
    folder = tmp_path / "again"
    assert main(["convert", "--to", "cla2", str(parts), str(folder)]) == 0
    again = load_file(folder / "model.safetensors")
    for name, weight in load_file(whole / "model.safetensors").items():
        assert torch.equal(again[name], weight)


def test_biases_are_shared_out_too(tmp_path):
    source = tmp_path / "source"
    old = dense(4, attention_bias=True)
    old.save_pretrained(source)
    new = ClaLlamaForCausalLM.from_pretrained(convert(source, "cla2"))
    found = new.model.layers[2].self_attn.k_proj.bias
    wanted = [old.model.layers[i].self_attn.k_proj.bias for i in (2, 3)]
    torch.testing.assert_close(found, sum(wanted) / 2)


def test_mistral_without_a_window(tmp_path):
    source = tmp_path / "source"
    old = dense(2, MistralConfig, MistralForCausalLM, sliding_window=None)
    old.save_pretrained(source)
    new = ClaLlamaForCausalLM.from_pretrained(convert(source, "cla1"))
    torch.testing.assert_close(logits(new, TOKENS), logits(old, TOKENS))
    assert (
        config_of(convert(source, "lckv-w0"))["rope_parameters"]
        == (config_of(source)["rope_parameters"])
    )


def test_tokenizer_comes_along(source):
    names = ["tokenizer.json", "tokenizer.model", "chat_template.jinja"]
    for name in [*names, "pytorch_model.bin", "README.md"]:
        (source / name).write_text(name)
    folder = convert(source, "cla2")
    for name in names:
        assert (folder / name).read_text() == name
    assert not (folder / "pytorch_model.bin").exists()
    assert not (folder / "README.md").exists()


def test_passes_and_windows(source):
    folder = convert(
        source,
        "lckv",
        "--layer-types",
        "0_4s_4_4_4_5",
        "--window",
        "9",
        "--passes",
        "3",
    )
    written = config_of(folder)
    assert written["layer_types"] == "0_4s_4_4_4_5"
    assert written["sliding_window"] == 9
    assert (written["forward_passes"], written["backward_passes"]) == (1, 2)
    written = config_of(convert(source, "lckv-w2", "--passes", "1"))
    assert (written["forward_passes"], written["backward_passes"]) == (0, 1)


def test_sandwich_of_the_paper():
    assert sandwich(22, 2) == ["0", *["20"] * 20, "21"]
    ten = [*range(5), *[16] * 12, *range(17, 22)]
    assert sandwich(22, 10) == list(map(str, ten))


def refused(capsys, *arguments):
    """The one line that the command complains in."""
    capsys.readouterr()
    assert main(["convert", *map(str, arguments)]) in (1, 2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "flags, match",
    [
        ("--to cla", "number"),
        ("--to claw2", "none of"),
        ("--to mla", "none of"),
        ("--to cla2 --layer-types 2_1_2_1_2_1", "number"),
        ("--to cla --layer-types 2_1", "2 entries"),
        ("--to lckv --layer-types 0_9_9_3_4_5", "reads layer 9"),
        ("--to lckv-w5", "at least 7 layers"),
        ("--to cla0", "at least 1"),
        ("--to cla2 --cla-map lasagna", "lasagna"),
        ("--to cla2 --passes 3", "passes means nothing"),
        ("--to cla2 --window 3", "window means nothing"),
        ("--to lckv-w2 --retention", "retention means nothing"),
        ("--to lckv-w2 --cla-map keep_ends", "cla_map means nothing"),
        ("--to yoco --layer-types 0_1", "layer_types means nothing"),
        ("--to yoco --window 3 --retention", "takes the place"),
        ("--to lckv-w2 --passes 0", "passes"),
    ],
)
def test_other_targets_are_refused(source, capsys, flags, match):
    folder = source.parent / "new"
    assert match in refused(capsys, *flags.split(), source, folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    "settings, to, match",
    [
        ({"layers": 3}, "yoco", "even"),
        ({"attention_bias": True}, "yoco", "biases"),
        ({"head_dim": 16}, "yoco", "head_dim"),
        ({"hidden_act": "gelu"}, "yoco", "gelu"),
        (
            {
                "config": MistralConfig,
                "model": MistralForCausalLM,
                "sliding_window": 8,
            },
            "cla2",
            "window of 8",
        ),
    ],
)
def test_other_llamas_are_refused(tmp_path, capsys, settings, to, match):
    source = tmp_path / "source"
    dense(**settings).save_pretrained(source)
    assert match in refused(capsys, "--to", to, source, tmp_path / "new")


def test_other_sources_are_refused(source, capsys):
    new = source.parent / "new"
    assert "config.json" in refused(capsys, "--to", "cla2", source / "none", new)
    GPT2Config().save_pretrained(source.parent / "gpt2")
    found = refused(capsys, "--to", "cla2", source.parent / "gpt2", new)
    assert "'gpt2' is none of llama, mistral" in found
    quantised = {**config_of(source), "quantization_config": {"quant_method": "fp8"}}
    (source / "config.json").write_text(json.dumps(quantised))
    assert "quantised" in refused(capsys, "--to", "cla2", source, new)


def test_broken_checkpoints_are_refused(source, capsys):
    new = source.parent / "new"
    for name in ("num_hidden_layers", "intermediate_size"):
        config = config_of(source)
        text = json.dumps({**config, name: config[name] + 2})
        (source / "config.json").write_text(text)
        for to in ("lckv-w2", "yoco"):
            found = refused(capsys, "--to", to, source, new)
            assert "is missing" in found or "would be" in found
        (source / "config.json").write_text(json.dumps(config))
    (source / "model.safetensors").write_bytes(b"none")
    assert "cannot be read" in refused(capsys, "--to", "cla2", source, new)
    (source / "model.safetensors").unlink()
    found = refused(capsys, "--to", "cla2", source, new)
    assert "has no model.safetensors" in found
    assert not new.exists()


def test_target_in_use_is_refused(source, capsys):
    assert "not an empty folder" in refused(capsys, "--to", "cla2", source, source)
    file = source / "config.json"
    assert "not an empty folder" in refused(capsys, "--to", "cla2", source, file)
