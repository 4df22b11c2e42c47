"""Speculative decoding changes no answer of a compressed request.

Drafts are verified over what is kept, and end where a compression looks. So the same
tokens are kept, at the same times, as without drafts: in a tight pool, too, where
requests are preempted, and for prompts read in chunks, or found in the prefix cache.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.matrix import METHODS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

CASES = Path(__file__).with_name("draft_cases.py")
LENGTHS = [500, 131, 64, 330, 227, 96, 90, 70]
COUNT = 60
NGRAM = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 2}
SETTINGS = {
    "method": "snapkv",
    "budget": 96,
    "window": 8,
    "decode": {"interval": 20},
}
TIGHT = {"num_gpu_blocks_override": 22, "max_num_batched_tokens": 64}
RUNNERS = {
    "v1": "vllm.v1.worker.cpu_model_runner",
    "v2": "vllm.v1.worker.cpu.model_runner",
}


def served(
    folder: Path,
    model: Path,
    settings: dict[str, Any],
    drafts: dict[str, Any],
    *,
    runner: str = "v1",
    asynchronous: bool = False,
    **engine: Any,
) -> dict[str, Any]:
    """Serve the same with and without drafts; checks what holds in any case."""
    case = {
        "model": str(model),
        "settings": settings,
        "lengths": LENGTHS,
        "count": COUNT,
        "asynchronous": asynchronous,
        "engine": {
            "speculative_config": {"num_speculative_tokens": 3, **drafts},
            **engine,
        },
    }
    output = folder / "output.json"
    done = subprocess.run(
        [sys.executable, str(CASES), runner, json.dumps(case), str(output)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(output.read_text())
    plain, drafted = found["plain"], found["drafted"]
    kind = "CompressedAsyncScheduler" if asynchronous else "CompressedScheduler"
    assert drafted["scheduler"] == kind
    assert drafted["runner"] == RUNNERS[runner]
    for turn, lengths in (("first", LENGTHS), ("again", LENGTHS[::-1])):
        for length, mine, theirs in zip(
            lengths, drafted[turn]["tokens"], plain[turn]["tokens"], strict=True
        ):
            assert mine == theirs, (turn, length)
    assert plain["drafted"] == 0
    assert 0 < drafted["accepted"] < drafted["drafted"]
    assert plain["leaked"] == drafted["leaked"] == 0
    assert plain["stats"]["compressions"] > 0
    assert plain["again"]["cached"] > 0
    if not drafted["preempted"]:
        assert drafted["again"]["cached"] == plain["again"]["cached"]
        for what in ("compressions", "tokens_evicted", "tokens_merged"):
            assert drafted["stats"][what] == plain["stats"][what]
    return drafted


def test_drafts_in_a_tight_pool(llama: Path, tmp_path: Path) -> None:
    """Preemptions, chunks and prefix hits; drafts stop again and again."""
    drafted = served(tmp_path, llama, SETTINGS, NGRAM, **TIGHT)
    assert drafted["preempted"] > 0
    assert drafted["again"]["cached"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("settings", METHODS, ids=str)
def test_every_method(settings: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    served(tmp_path, llama, settings, NGRAM)


COURSES: dict[str, dict[str, Any]] = {
    "reading": {
        **SETTINGS,
        "prefill": "incremental",
        "prefill_interval": 96,
    },
    "layers": {**SETTINGS, "method": "pyramidkv", "layers_per_tier": 1},
    "pruning": {"method": "pyramidinfer"},
    "uneven heads": {"method": "ada_snapkv", "budget": 96, "decode": {"interval": 40}},
    "no window": {
        "method": "streamingllm",
        "budget": 96,
        "decode": {"method": "keydiff", "interval": 16},
    },
    "answers merge": {"method": "minicache", "start_layer": 0, "interval": 16},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COURSES)
def test_every_course(name: str, llama: Path, tmp_path: Path) -> None:
    served(tmp_path, llama, COURSES[name], NGRAM)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runner", "asynchronous", "method"),
    [
        ("v1", False, "draft_model"),
        ("v1", True, "draft_model"),
        ("v2", False, "draft_model"),
        ("v2", True, "draft_model"),
        ("v2", False, "ngram"),
        ("v2", True, "ngram_gpu"),
    ],
)
def test_runners(
    runner: str, asynchronous: bool, method: str, llama: Path, tmp_path: Path
) -> None:
    """A draft model sees all tokens, so the model itself guesses wrong sometimes."""
    drafts = {**NGRAM, "method": method}
    tight = TIGHT
    if method == "draft_model":
        drafts = {"method": method, "model": str(llama)}
        tight = {**TIGHT, "num_gpu_blocks_override": 42}
    drafted = served(
        tmp_path,
        llama,
        SETTINGS,
        drafts,
        runner=runner,
        asynchronous=asynchronous,
        **tight,
    )
    assert drafted["preempted"] > 0


@pytest.mark.slow
def test_a_deeper_model_than_its_drafts(
    deep_llama: Path, llama: Path, tmp_path: Path
) -> None:
    """Its layers are cut into groups of as many as the draft model has."""
    drafts = {"method": "draft_model", "model": str(llama)}
    served(tmp_path, deep_llama, SETTINGS, drafts, num_gpu_blocks_override=800)
