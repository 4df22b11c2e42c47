"""vLLM's V2 runner, asynchronous scheduling and a GPU backend, all on the CPU.

See `v2_harness` for how, and `v2_cases` for what runs. V1 runs the same cases, and
what V2 keeps and answers must be V1's.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import save_llama
from vllm_kvcompress.footprint import Footprint

CASES = Path(__file__).with_name("v2_cases.py")
RUNNERS = {
    "v1": "vllm.v1.worker.cpu_model_runner",
    "v2": "vllm.v1.worker.cpu.model_runner",
}
TOLERANCE = 5e-4
# The first test of a runner waits for all of its cases.
pytestmark = pytest.mark.timeout(900)
LAYERS = 2

Results = dict[str, Any]


def _run(runner: str, model: Path, folder: Path, kind: str = "all") -> Results:
    output = folder / f"{runner}.json"
    done = subprocess.run(
        [sys.executable, str(CASES), runner, kind, str(model), str(output)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def v1(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return _run("v1", llama, tmp_path_factory.mktemp("v1"))


@pytest.fixture(scope="module")
def v2(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return _run("v2", llama, tmp_path_factory.mktemp("v2"))


@pytest.fixture(params=["v1", "v2"])
def results(request: pytest.FixtureRequest) -> Results:
    found = request.getfixturevalue(request.param)
    assert {case["runner"] for case in found.values()} == {RUNNERS[request.param]}
    return found


def _answers(case: Results) -> Iterator[Results]:
    for value in case.values():
        if isinstance(value, list) and isinstance(value[0], dict):
            yield from value


@pytest.mark.parametrize("case", ["ample", "tight", "tight_async"])
def test_logits_are_the_dense_models(results: Results, case: str) -> None:
    answers = list(_answers(results[case]))
    assert results[case]["backends"] == ["Compressed_CPU_ATTN"]
    assert any(answer["kept"] for answer in answers)
    for answer in answers:
        assert answer["error"] < TOLERANCE, answer["length"]


def test_v2_keeps_and_answers_as_v1(v1: Results, v2: Results) -> None:
    for case in ("all", "hits", "straddled", "successor"):
        for mine, theirs in zip(v2["ample"][case], v1["ample"][case], strict=True):
            for key in ("kept", "tokens", "cached"):
                assert mine[key] == theirs[key], (case, mine["length"], key)


def test_courses_are_the_same_everywhere(v1: Results, v2: Results) -> None:
    first = v1["courses"]
    assert first["compressions"] > 2 * len(first["tokens"])
    for case in (v2["courses"], v1["courses_async"], v2["courses_async"]):
        assert case["tokens"] == first["tokens"]
        assert case["compressions"] >= first["compressions"]
        assert case["clashes"] == 0


def test_prefix_hits(results: Results) -> None:
    unhurried = {answer["length"]: answer for answer in results["ample"]["all"]}
    for answer in results["ample"]["hits"]:
        first = unhurried[answer["length"]]
        assert answer["cached"] == (answer["length"] - 16) // 32 * 32
        assert answer["kept"] == first["kept"]
        assert answer["tokens"] == first["tokens"][:8]


def test_windows_in_two_chunks(results: Results) -> None:
    """A last chunk of one token is a decode to vLLM, but not to CUDA graphs."""
    case = results["ample"]
    (answer,) = case["straddled"]
    whole = next(a for a in case["all"] if a["length"] == answer["length"])
    assert answer["kept"] == whole["kept"]
    assert case["one_token_ends"] > 0
    assert case["hidden"] == 0


def test_slots_are_taken_over_cleanly(v2: Results) -> None:
    assert {case["clashes"] for case in v2.values()} == {0}


@pytest.mark.parametrize("case", ["tight", "tight_async"])
def test_preempted_answers_equal_unhurried(results: Results, case: str) -> None:
    assert results[case]["preempted"] > 0
    for mine, unhurried in zip(
        results[case]["all"], results["ample"]["all"], strict=True
    ):
        assert mine["tokens"] == unhurried["tokens"]
        for life in range(0, len(mine["kept"]), LAYERS):
            assert mine["kept"][life : life + LAYERS] == unhurried["kept"]


def test_async_scheduling_is_on(results: Results) -> None:
    case = results["tight_async"]
    assert case["scheduler"] == "CompressedAsyncScheduler"
    assert case["batch_queue"]
    assert case["overlap"] == 2
    assert results["tight"]["scheduler"] == "CompressedScheduler"
    assert not results["tight"]["batch_queue"]


def test_triton_attention(llama: Path, tmp_path: Path) -> None:
    case = _run("v2", llama, tmp_path, "triton")["triton"]
    assert case["runner"] == RUNNERS["v2"]
    assert case["backends"] == ["Compressed_TRITON_ATTN"]
    for answer in case["all"]:
        assert answer["kept"]
        assert answer["error"] < TOLERANCE, answer["length"]


# An engine may round an element the other way than the dense model does: by an eighth
# of it in 8-bit floats, where wrong scales show as 1.
@pytest.mark.parametrize(
    ("kv_cache_dtype", "tolerance"),
    [
        ("auto", TOLERANCE),
        ("fp8", 0.1),
        ("int8_per_token_head", 5e-3),
        ("fp8_per_token_head", 0.1),
        ("int4_per_token_head", 5e-2),
    ],
)
def test_pairs_share_codes(
    kv_cache_dtype: str, tolerance: float, tmp_path: Path
) -> None:
    """A lone layer, a shallow and a deep one; pages of Triton's kernels.

    Answers are a dense model's with such codes, or vLLM's own where nothing merges;
    memory is what the formula says.
    """
    model = save_llama(tmp_path / "model", layers=3)
    case = _run("v2", model, tmp_path, kv_cache_dtype)["merging"]
    assert case["backends"] == ["Compressed_TRITON_ATTN"] * 3
    assert case["due"] == [94, 96]
    assert case["leaked"] == 0
    assert case["stock"]
    assert case["error"] < tolerance < case["loss"]
    # Head size 32; of scales and of factors there is one each for keys and values.
    tokens = {"auto": 256, "fp8": 64, "int4_per_token_head": 32 + 8}
    token = tokens.get(kv_cache_dtype, 64 + 8)
    taken = Footprint(3, [(1, 2)], 32, 2, token, factor_bytes=8)
    assert case["bytes"] == taken.request_bytes(100, retain=0.25)
    assert case["share"] == 8 / token


@pytest.mark.parametrize("runner", RUNNERS)
def test_uneven_heads(runner: str, lopsided: Path, tmp_path: Path) -> None:
    """On both runners, tight pools, async scheduling and the GPU's Triton kernels."""
    cases = _run(runner, lopsided, tmp_path, "uneven")
    assert ("triton" in cases) == (runner == "v2")
    for name, case in cases.items():
        backend = "TRITON_ATTN" if name == "triton" else "CPU_ATTN"
        assert case["runner"] == RUNNERS[runner]
        assert case["backends"] == [f"HeadMajorCompressed_{backend}"] * LAYERS
        assert (case["preempted"] > 0) == (backend == "CPU_ATTN")
        assert case["clashes"] == 0
        for answer in case["all"]:
            assert answer["error"] < TOLERANCE, answer["length"]
        shares = {
            tuple(len(head) for head in layer)
            for answer in case["all"]
            for layer in answer["kept"]
        }
        assert any(len(set(layer)) > 1 for layer in shares)
    assert cases["tight_async"]["batch_queue"]
