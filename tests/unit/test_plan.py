"""`kvcompress plan` from its arguments to tables, file and picture; no engine."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_kvcompress.methods import METHODS
from vllm_kvcompress.tools.main import main
from vllm_kvcompress.tools.plan.command import default_lengths
from vllm_kvcompress.tools.plan.report import size

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
TINY = {**LLAMA, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 100}


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def folder(path: Path, config: dict[str, Any]) -> str:
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def planned(tmp_path: Path, config: dict[str, Any], *flags: str) -> dict[str, Any]:
    file = tmp_path / "plan.json"
    assert main(["plan", folder(tmp_path, config), *flags, "--json", str(file)]) == 0
    return json.loads(file.read_text())


def by_method(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: record for record in result["records"] for name in record["methods"]}


def test_tables(tmp_path, capsys) -> None:
    flags = ("--kv-space", "40", "--budgets", "1024,2048")
    result = planned(tmp_path, LLAMA, *flags, "--plot", str(tmp_path / "plan.png"))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "stores all tokens in 32 of its 32 layers" in shown
    assert "full cache           │ 512 MiB │ 4.00 GiB │ 16.0 GiB │" in shown
    assert "snapkv +7: also ada_snapkv, streamingllm" in shown
    assert "Into 40.0 GiB fit 2 requests of 131,072 tokens" in " ".join(shown.split())
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert set(by_method(result)) == {"full cache", *METHODS}
    assert result["kv_space_bytes"] == 40 * 2**30
    full, snapkv = result["records"][:2]
    assert full["held_bytes"]["131072"] == 16 * 2**30
    assert snapkv["held_bytes"] == dict.fromkeys(full["held_bytes"], 2**27)
    assert snapkv["peak_bytes"]["131072"] == 16 * 2**30 + 2**27
    assert full["requests"]["131072"] == 2
    assert snapkv["requests"]["131072"] == 1 + (40 * 512 - 1 - 16 * 512) // 64


def test_sentence_is_about_what_fits(tmp_path, capsys) -> None:
    for space, sentence in (
        ("6.5", "Into 6.50 GiB fit 1 request of 32,768 tokens with the full cache, 2"),
        ("0.1", "No request of 4,096 tokens fits into 102 MiB."),
    ):
        planned(tmp_path, LLAMA, "--kv-space", space)
        assert sentence in " ".join(capsys.readouterr().out.split())


def test_config_file_and_settings(tmp_path, capsys) -> None:
    file = Path(folder(tmp_path, LLAMA)) / "config.json"
    settings = '{"prefill": "incremental", "decode": {"interval": 128}}'
    flags = ["--methods", "snapkv,minicache", "--config", settings, "--kv-space", "3"]
    assert main(["plan", str(file), *flags]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "A prompt is compressed while it is read" in shown
    assert "Not planned: minicache: decode cannot be given for minicache" in shown


def test_settings_with_a_size_replace_budgets(tmp_path) -> None:
    result = planned(tmp_path, LLAMA, "--config", '{"keep_ratio": 0.25}')
    snapkv = by_method(result)["snapkv"]
    assert snapkv["budget"] is None
    assert snapkv["held_bytes"]["32768"] == 2**30
    assert "keep_ratio" in result["refused"]["pyramidinfer"]


def test_refusals_by_model(tmp_path, capsys) -> None:
    latent = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    result = planned(tmp_path, latent)
    assert set(result["refused"]) == set(METHODS)
    assert [record["methods"] for record in result["records"]] == [["full cache"]]
    shown = " ".join(capsys.readouterr().out.split())
    assert "random: MLA attention cannot be compressed." in shown


@pytest.mark.parametrize(
    ("changes", "dtype", "refused"),
    [
        ({}, "auto", set()),
        ({}, "int8_per_token_head", {"ada_snapkv"}),
        ({}, "int4_per_token_head", set(METHODS) - {"minicache"}),
        ({"architectures": ["XForCausalLM"]}, "fp8", {"pyramidinfer"}),
        (
            {"model_type": "cla-llama", "architectures": ["ClaLlamaForCausalLM"]},
            "auto",
            {"pyramidinfer", "minicache"},
        ),
        ({"num_hidden_layers": 1}, "auto", {"minicache"}),
    ],
)
def test_refusals_by_method(tmp_path, changes, dtype, refused) -> None:
    result = planned(tmp_path, {**LLAMA, **changes}, "--kv-cache-dtype", dtype)
    assert set(result["refused"]) == refused
    assert set(by_method(result)) == {"full cache", *METHODS} - refused


def test_weights(tmp_path, capsys) -> None:
    """From the index, else from the files, else from the configuration."""
    memory = ("--gpu-memory", "2", "--methods", "knorm")
    per_layer = 2 * 64 * 64 + 2 * 64 * 16 + 3 * 64 * 64 + 2 * 64
    estimated = 2 * (32 * per_layer + 2 * 100 * 64 + 64)
    usable = int(2 * 2**30 * 0.9)
    assert planned(tmp_path, TINY, *memory)["kv_space_bytes"] == usable - estimated
    assert "estimated from the config" in capsys.readouterr().out
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    assert planned(tmp_path, TINY, *memory)["kv_space_bytes"] == usable - 1000
    index = {"metadata": {"total_size": 2**30}, "weight_map": {}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert planned(tmp_path, TINY, *memory)["kv_space_bytes"] == usable - 2**30
    given = planned(tmp_path, TINY, *memory, "--weights", "1.5")
    assert given["kv_space_bytes"] == usable - 3 * 2**29


@pytest.mark.parametrize(
    ("flags", "error", "code"),
    [
        (["--methods", "nope"], "allowed values: snapkv", 1),
        (["--config", '{"budgets": 3}'], "unknown key 'budgets'", 1),
        (["--config", "[]"], "argument --config", 2),
        (["--lengths", "many"], "argument --lengths", 2),
        (["--gpu-memory", "-3"], "argument --gpu-memory", 2),
        (["--gpu-memory", "nan"], "argument --gpu-memory", 2),
        (["--gpu-memory-utilization", "2"], "argument --gpu-memory-utilization", 2),
        (["--gpu-memory", "1", "--weights", "1"], "not more than the weights", 1),
        (["--kv-cache-dtype", "int3"], "invalid choice", 2),
        (["--plot", "plan.txt"], "must end in one of", 1),
    ],
)
def test_bad_arguments(tmp_path, capsys, flags, error, code) -> None:
    assert main(["plan", folder(tmp_path, LLAMA), *flags]) == code
    said = capsys.readouterr().err
    assert error in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("{", "no readable config"),
        ("{}", "no readable config"),
        ('{"model_type": "telepathy"}', "`telepathy`"),
        ('{"model_type": "mamba"}', "no attention layer"),
        ('{"model_type": "llama", "num_hidden_layers": "x"}', "no readable config"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "no readable config"),
        ('{"model_type": "llama", "head_dim": -1}', "cannot be used"),
        ('{"model_type": "llama", "kv_lora_rank": 512}', "cannot be used"),
        ('{"model_type": "llama", "sliding_window": "x"}', "cannot be used"),
        ('{"model_type": "gemma3n_text", "num_hidden_layers": 7}', "cannot be used"),
    ],
)
def test_bad_models(tmp_path, capsys, content, error) -> None:
    (tmp_path / "config.json").write_text(content)
    assert main(["plan", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert error in said
    assert said.count("kvcompress plan: error:") == 1


def test_no_model(tmp_path, capsys) -> None:
    assert main(["plan", str(tmp_path)]) == 1
    assert "has no config.json" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "gone")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert main(["plan", "no/such-model"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_lengths_end_at_the_models() -> None:
    assert default_lengths(131072) == [4096, 32768, 131072]
    assert default_lengths(2048) == [1024, 2048]
    assert default_lengths(512) == [512]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1024, "1.00 KiB"),
        (2**20 - 1, "1.00 MiB"),
        (10 * 2**30, "10.0 GiB"),
        (2**40, "1,024 GiB"),
    ],
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text
