"""Pictures on both of vLLM's runners, in incremental prefill; who is refused."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import Answer, chunks, engine, generate, scheduler
from tests.engine.pictures import flags, illustrate, illustrated
from tests.engine.serving import ENGINE, SERVERS, requests
from tests.engine.test_serving import CASES, RUNNERS, check
from tests.unit.test_refusals import _config
from vllm_kvcompress import stats
from vllm_kvcompress.config import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("family", ["idefics3", "paddleocr_vl"])
def test_both_runners(
    family: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """Asynchronous and in little space, both answer alike."""
    found = {}
    for runner in RUNNERS:
        output = tmp_path / runner
        command = [sys.executable, str(CASES), runner, str(saved(family)), str(output)]
        done = subprocess.run(
            [*command, family, "even", "pruning"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found[runner] = torch.load(output)
    for name in ("even", "pruning"):
        asked = illustrate(requests(SERVERS[name]), family)
        expected = sum(request.compressions for request in asked)
        both = []
        for runner, served in found.items():
            case = served[name]
            assert case["runner"] == RUNNERS[runner]
            assert case["undone"]
            assert case["compressions"] == expected + sum(case["undone"])
            assert case["leaked"] == 0
            both.append([Answer(**answer) for answer in case["answers"]])
        check(asked, *both)


@pytest.mark.parametrize("family", ["idefics3", "paddleocr_vl"])
def test_pictures_are_cut_while_they_are_read(
    family: str, saved: Callable[[str], Path]
) -> None:
    """Every 96 tokens of a prompt, which may be amid a picture; in chunks alike."""
    settings = {
        **{"method": "snapkv", "budget": 64, "window": 8},
        **{"prefill": "incremental", "prefill_interval": 96},
        "decode": {"interval": 128},
    }
    prompts = [illustrated(family, n, n).given for n in (306, 231, 90)]
    config = {"kv_compression": settings}
    with engine(
        saved(family), additional_config=config, **{**ENGINE, **flags(family)}
    ) as llm:
        alone = []
        for own in prompts:
            assert scheduler(llm).reset_prefix_cache()
            alone += generate(llm, [own])
        counted = stats(llm)["compressions"]
        assert counted > 2 * len(prompts)
        with chunks(llm, 50):
            found = generate(llm, prompts)
        assert stats(llm)["compressions"] == 2 * counted
    for mine, theirs in zip(found, alone, strict=True):
        assert mine.near(theirs)


@pytest.mark.parametrize(
    ("name", "config", "settings", "words"),
    [
        ("PaliGemma", {}, {}, "bidirectional multimodal prefixes"),
        ("Whisper", {}, {}, "encoder-decoder models"),
        (
            "Idefics3",
            {"text_config": {"model_type": "phi"}},
            {"method": "pyramidinfer"},
            "pyramidinfer on Idefics3ForConditionalGeneration.*add prune=false",
        ),
    ],
    ids=["prefix", "encoder", "pruning"],
)
def test_models_that_are_refused(
    name: str,
    config: dict[str, Any],
    settings: dict[str, Any],
    words: str,
    tmp_path: Path,
) -> None:
    import transformers

    made = getattr(transformers, f"{name}Config")(**config)
    made.architectures = [f"{name}ForConditionalGeneration"]
    made.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=words):
        _config(tmp_path, settings)
