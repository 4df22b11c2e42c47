"""Flags, files and keywords: every spelling folds into one dict."""

from pathlib import Path

import pytest

pytest.importorskip("vllm")

import vllm
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

import vllm_kvcompress
from vllm_kvcompress.config import ConfigError, KVCompressionConfig
from vllm_kvcompress.engine.args import config_of

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[2]
MODEL = Path(vllm_kvcompress.__file__).parent / "assets" / "needle"
WANTED = {"kv_compression": {"method": "snapkv", "budget": 2048, "window": 16}}

vllm_kvcompress.register()


@pytest.fixture(scope="module")
def parser():
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


def parse(parser, *args):
    return parser.parse_args(list(args)).additional_config


@pytest.mark.parametrize(
    "args",
    [
        ["--kv-compression", "snapkv", "--kv-compression-config"]
        + ['{"budget": 2048, "window": 16}'],
        ["--kv-compression-config", '{"budget": 2048, "window": 16}']
        + ["--kv-compression=snapkv"],
        ["--kv_compression=snapkv", "--kv_compression_config.window=16"]
        + ["--kv_compression_config.budget", "2K"],
        ["--kv-compression-config.method", "snapkv"]
        + ["--kv-compression-config.budget", "2048"]
        + ["--kv-compression-config.window", "16"],
        ["--additional-config.kv_compression.method", "snapkv"]
        + ["--additional-config.kv_compression.budget", "2048"]
        + ["--additional-config.kv_compression.window", "16"],
        ["--additional-config", '{"kv_compression": {"budget": 2048}}']
        + ["--kv-compression", "snapkv", "--kv-compression-config.window", "16"],
        ["--kv-compression", "snapkv", "--kv-compression-config.window", "16"]
        + ["--additional-config", '{"kv_compression": {"budget": 2048}}'],
        ["--kv-compression-config", '{"budget": 64, "window": 16}']
        + ["--kv-compression", "snapkv", "--kv-compression-config.budget", "2048"],
    ],
    ids=" ".join,
)
def test_flags(parser, args):
    assert parse(parser, *args) == WANTED


@pytest.mark.parametrize("order", [1, -1])
def test_other_additional_config_stays(parser, order):
    pairs = [["--kv-compression", "streamingllm"], ["--additional-config", '{"a": 1}']]
    args = [word for pair in pairs[::order] for word in pair]
    assert parse(parser, *args) == {
        "a": 1,
        "kv_compression": {"method": "streamingllm"},
    }


def test_preset(parser):
    preset = str(ROOT / "configs" / "snapkv.yaml")
    settings = parse(parser, "--config", preset)["kv_compression"]
    assert settings["method"] == "snapkv"
    args = ["--config", preset, "--kv-compression-config.budget", "512"]
    assert parse(parser, *args) == {"kv_compression": {**settings, "budget": 512}}


def test_no_flag_leaves_everything(parser):
    namespace = parser.parse_args(["--additional-config", '{"a": 1}'])
    assert namespace.additional_config == {"a": 1}
    assert not [name for name in vars(namespace) if "kv_compression" in name]
    assert parse(parser) == EngineArgs("m").additional_config == {}


def test_namespace_carries_it(parser):
    """Spawned API servers build their EngineArgs from it before plugins load."""
    namespace = parser.parse_args(["--kv-compression", "snapkv"])
    assert not [name for name in vars(namespace) if "kv_compression" in name]
    args = AsyncEngineArgs.from_cli_args(namespace)
    assert args.additional_config == {"kv_compression": {"method": "snapkv"}}


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--kv-compression", "nope"], ["'nope'", "'snapkv'", "'streamingllm'"]),
        (["--kv-compression-config.budget", "64"], ["--kv-compression METHOD"]),
        (["--kv-compression-config", "{budget"], ["'{budget'", "JSON"]),
        (["--kv-compression-config", "7"], ["'7'", "JSON"]),
        (
            ["--kv-compression", "snapkv", "--kv-compression-config.budget", "x"],
            ["budget='x'", "integer"],
        ),
        (
            ["--kv-compression", "snapkv", "--kv-compression-config.sinks", "4"],
            ["'sinks'", "window"],
        ),
        (
            ["--kv-compression", "snapkv"]
            + ["--additional-config", '{"kv_compression": {"method": "streamingllm"}}'],
            ["method", "'snapkv'", "'streamingllm'"],
        ),
        (
            ["--additional-config", '{"kv_compression": {"method": "nope"}}'],
            ["'nope'", "snapkv"],
        ),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_flags_exit_with_one_sentence(parser, args, told, capsys):
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(args)
    assert caught.value.code == 2
    sentence = capsys.readouterr().err.rpartition("error: ")[2].strip()
    assert "\n" not in sentence
    for part in told:
        assert part in sentence


def test_help(parser, monkeypatch):
    monkeypatch.setattr(FlexibleArgumentParser, "_search_keyword", "kvcompression")
    text = " ".join(parser.format_help().split())
    for part in ["--kv-compression METHOD", "snapkv", "streamingllm", "keep_ratio"]:
        assert part in text
    assert "window (snapkv)" in text
    assert "kernel_size (snapkv)" in text
    assert "sinks (streamingllm)" in text


@pytest.mark.parametrize("cls", [EngineArgs, AsyncEngineArgs])
def test_keywords(cls):
    settings = {"budget": 2048, "window": 16}
    args = cls("m", kv_compression="snapkv", kv_compression_config=settings)
    assert args.additional_config == WANTED
    assert settings == {"budget": 2048, "window": 16}
    args = cls("m", kv_compression="snapkv", additional_config={"a": 1})
    assert args.additional_config == {"a": 1, "kv_compression": {"method": "snapkv"}}
    assert cls("m", kv_compression=None).additional_config == {}


@pytest.mark.parametrize(
    "keywords",
    [
        {"kv_compression": "nope"},
        {"kv_compression_config": {"budget": 64}},
        {"kv_compression": "snapkv", "kv_compression_config": [1]},
        {"kv_compression": "snapkv", "kv_compression_config": {"budget": "64"}},
        {
            "kv_compression": "snapkv",
            "additional_config": {"kv_compression": {"method": "streamingllm"}},
        },
    ],
    ids=str,
)
def test_bad_keywords(keywords):
    with pytest.raises(ConfigError):
        EngineArgs("m", **keywords)


def test_other_vllm_is_refused_only_when_asked(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.34.1")
    assert EngineArgs("m").additional_config == {}
    with pytest.raises(ConfigError, match=r"vLLM 0\.32 or 0\.33, not 0\.34\.1"):
        EngineArgs("m", kv_compression="snapkv")


def test_engine_config_shows_resolved_settings():
    args = EngineArgs(str(MODEL), kv_compression="snapkv", max_model_len=1024)
    config = args.create_engine_config()
    resolved = KVCompressionConfig.from_dict({"method": "snapkv"})
    assert config.additional_config == {"kv_compression": resolved.settings()}
    assert config_of(config) == resolved
    assert args.additional_config == {"kv_compression": {"method": "snapkv"}}


def test_engine_config_without_compression_is_stock():
    config = EngineArgs(str(MODEL), max_model_len=1024).create_engine_config()
    assert config.additional_config == {}
    assert config.scheduler_config.scheduler_cls is None
    assert config_of(config) is None
