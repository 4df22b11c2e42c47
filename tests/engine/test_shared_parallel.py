"""Models that share KV across two workers, splits that they refuse, and drafts.

Each engine has a process to itself: of workers, or since vLLM's n-gram drafts leave
one in which no other engine starts.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import prompt
from tests.engine.shared_checks import TOLERANCE
from tests.engine.shared_models import Made, make

pytestmark = pytest.mark.vllm
LENGTHS = [3, 100, 231]
SHORT = [1, 3, 5]
COUNT = 60
DRAFTS = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 2,
}
SCRIPT = """
import json, sys

def main(model, settings, prompts):
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        block_size=32,
        disable_log_stats=False,
        num_gpu_blocks_override=200,
        **json.loads(settings),
    )
    params = SamplingParams(
        max_tokens=60, temperature=0.0, detokenize=False, ignore_eos=True, logprobs=0
    )
    given = [{"prompt_token_ids": tokens} for tokens in json.loads(prompts)]
    outputs = llm.generate(given, params, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    print("@" + json.dumps([
        [
            list(answer.token_ids),
            [row[t].logprob for t, row in zip(answer.token_ids, answer.logprobs)],
        ]
        for answer in answers
    ]))
    if llm.llm_engine.vllm_config.speculative_config:
        counted = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
        names = ("accepted_tokens", "draft_tokens")
        print("#" + json.dumps([counted[f"vllm:spec_decode_num_{n}"] for n in names]))

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


def run(
    folder: Path, model: Path, lengths: list[int], **settings: Any
) -> subprocess.CompletedProcess[str]:
    """Answer prompts in a process of its own."""
    size = settings.get("tensor_parallel_size", 1)
    size *= settings.get("pipeline_parallel_size", 1)
    cores = sorted(os.sched_getaffinity(0))
    binding = "|".join(str(cores[worker % len(cores)]) for worker in range(size))
    script = folder / "run.py"
    script.write_text(SCRIPT)
    prompts = [prompt(n, seed=n) for n in lengths]
    given = [str(model), json.dumps(settings), json.dumps(prompts)]
    return subprocess.run(
        [sys.executable, str(script), *given],
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": binding},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def check(made: Made, lengths: list[int], done: Any) -> None:
    """Compare the answers with the definition's."""
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [ln for ln in done.stdout.splitlines() if ln.startswith("@")]
    for length, (tokens, found) in zip(lengths, json.loads(line[1:]), strict=True):
        assert len(tokens) == COUNT
        wanted = made.logprobs([*prompt(length, seed=length), *tokens[:-1]])
        wanted = wanted[length - 1 :]
        assert wanted.argmax(1).tolist() == tokens
        chosen = wanted.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert float((chosen - torch.tensor(found)).abs().max()) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["cla2", "cla_norms", "lckv", "yoco", "yoco_retention"]
)
def test_two_workers_answer_as_the_definition(name: str, tmp_path: Path) -> None:
    made = make(name, tmp_path / "model")
    exact = {k: v for k, v in made.exact.items() if k == "use_sequential"}
    settings = {"tensor_parallel_size": 2, "hf_overrides": exact}
    done = run(tmp_path, made.path, LENGTHS, **settings)
    check(made, LENGTHS, done)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cla2", "lckv", "yoco"])
def test_drafts_change_no_answer(name: str, tmp_path: Path) -> None:
    """Chunks of drafts are short enough for condensed layers to be exact."""
    made = make(name, tmp_path / "model")
    done = run(tmp_path, made.path, SHORT, speculative_config=DRAFTS)
    check(made, SHORT, done)
    (line,) = [ln for ln in done.stdout.splitlines() if ln.startswith("#")]
    accepted, drafted = json.loads(line[1:])
    assert 0 < accepted < drafted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        (
            "lckv",
            {"pipeline_parallel_size": 2},
            "layer 1 reads the KV of layer 4, which is on another pipeline stage; use "
            "--pipeline-parallel-size 1, or cut the stages elsewhere with "
            "VLLM_PP_LAYER_PARTITION",
        ),
        (
            "yoco_retention",
            {"speculative_config": DRAFTS},
            "cannot take rejected drafts out of its states; do without speculative "
            "decoding (--speculative-config)",
        ),
        (
            "yoco",
            {"tensor_parallel_size": 4},
            "--tensor-parallel-size 4 does not divide the 2 KV heads of this YOCO "
            "model; use a divisor",
        ),
        (
            "yoco",
            {"pipeline_parallel_size": 2},
            "Pipeline parallelism is not supported for this model",
        ),
    ],
)
def test_refused_splits(
    name: str, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    made = make(name, tmp_path / "model")
    done = run(tmp_path, made.path, [3], **settings)
    assert done.returncode != 0
    assert said in done.stdout + done.stderr, done.stderr[-4000:]
