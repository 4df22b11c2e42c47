"""The same by flags, files and keywords: taken as it is, or refused in one line."""

import contextlib
import io
import json

import pytest
import yaml

pytest.importorskip("vllm")

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

import vllm_kvcompress
from tests.unit.drawn_settings import COMMON, any_method, texts, told, values
from vllm_kvcompress.config import KEY, ConfigError, KVCompressionConfig

pytestmark = pytest.mark.vllm

vllm_kvcompress.register()

fuzzed = settings(
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
wanted = (
    any_method(COMMON)
    | any_method(COMMON, near=False)
    | st.dictionaries(texts, values, max_size=3)
)
parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


def parsed(*args):
    """The settings that the flags come to, None if they were refused properly."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found = parser.parse_args(list(args)).additional_config
    except SystemExit as exit:
        assert exit.code == 2
        told(said.getvalue().rpartition("error: ")[2].removesuffix("\n"))
        return None
    KVCompressionConfig.from_dict(found[KEY])
    return found[KEY]


def same(found, given):
    """Nothing has changed, not a type either; NaN is refused anyway."""
    assert found is None or json.dumps(found, sort_keys=True) == json.dumps(
        given, sort_keys=True
    )


@fuzzed
@given(wanted)
def test_json(given):
    own = {key: value for key, value in given.items() if key != "method"}
    flags = [f"--kv-compression={given['method']}"] if "method" in given else []
    same(parsed(*flags, "--kv-compression-config", json.dumps(own)), given)
    same(parsed("--additional-config", json.dumps({KEY: given})), given)


@fuzzed
@given(any_method(COMMON))
def test_one_by_one(given):
    flags = [
        f"--kv-compression-config.{key}={json.dumps(value)}"
        for key, value in given.items()
        if key and not {"=", ".", "+"} & {*key}
    ]
    assert flags
    parsed(*flags)


@fuzzed
@given(st.text() | texts)
@example("[" * 100_000)
@example('{"a":' * 100_000)
@example('{"budget": ' + "1" * 5000 + "}")
def test_what_is_not_json(text):
    found = parsed("--kv-compression", "snapkv", f"--kv-compression-config={text}")
    assert found in (None, {"method": "snapkv"})


@fuzzed
@given(wanted)
def test_file(tmp_path_factory, given):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    own = {key: value for key, value in given.items() if key != "method"}
    flags = {"kv-compression": given.get("method", "snapkv")}
    path.write_text(yaml.safe_dump({**flags, "kv-compression-config": own}))
    same(parsed("--config", str(path)), {"method": "snapkv", **given})


@fuzzed
@given(values | st.sampled_from(["snapkv", None]), values | wanted, values | wanted)
@example("snapkv", [], None)
@example("snapkv", None, 5)
@example("snapkv", None, {KEY: []})
@example(None, None, {KEY: {"method": ["lckv"]}})
@example(None, {"method": "lckv", 1: 2, "a": 3}, None)
@example("snapkv", {"keep_ratio": float("nan")}, None)
@example("snapkv", {"budget": 10**5000}, None)
@example(None, {"budget": b"64"}, None)
def test_keywords(method, config, additional):
    try:
        args = EngineArgs(
            "m",
            kv_compression=method,
            kv_compression_config=config,
            additional_config=additional,
        )
    except ConfigError as error:
        told(str(error))
        return
    if method is None and config is None:
        assert args.additional_config is additional
        return
    KVCompressionConfig.from_dict(args.additional_config[KEY])
    same(
        args.additional_config[KEY],
        {
            **(config or {}),
            **((additional or {}).get(KEY) or {}),
            **({"method": method} if method else {}),
        },
    )
