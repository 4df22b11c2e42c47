"""Keywords work after any usual import of vLLM, and nothing else is wrapped."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("vllm")

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BUILD = """
args = Args("m", kv_compression="snapkv", kv_compression_config={"budget": 512})
wanted = {"kv_compression": {"method": "snapkv", "budget": 512}}
assert args.additional_config == wanted, args.additional_config
"""
STOCK = """
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.metrics.loggers import StatLoggerManager
import vllm.engine, types
assert type(vllm.engine) is types.ModuleType
assert not hasattr(InputProcessor._validate_params, "__wrapped__")
assert not hasattr(StatLoggerManager.__init__, "__wrapped__")
"""


def run(code, **environment):
    env = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=env, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "from vllm import LLM; from vllm.entrypoints.llm import EngineArgs as Args",
        "import vllm; vllm.LLM; Args = vllm.EngineArgs",
        "from vllm import EngineArgs as Args",
        "from vllm.platforms import current_platform; current_platform.device_type; "
        "from vllm import AsyncEngineArgs as Args",
    ],
)
def test_import_orders(imports):
    run(imports + BUILD + STOCK)


def test_without_the_early_hook():
    """`register()` does the same where vLLM calls no platform plugin."""
    imports = """
import vllm_kvcompress
vllm_kvcompress.register()
vllm_kvcompress.register()
from vllm import EngineArgs as Args
"""
    run(imports + BUILD, VLLM_TARGET_DEVICE="cpu")


def test_import_is_light():
    run(
        "import sys, vllm_kvcompress; "
        "assert not {'torch', 'vllm', 'pydantic'} & sys.modules.keys()"
    )
