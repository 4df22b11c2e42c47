"""Models that share KV across two workers, and the splits that they refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import prompt
from tests.engine.shared_models import make
from tests.engine.test_shared_models import TOLERANCE

pytestmark = pytest.mark.vllm
LENGTHS = [3, 100, 231]
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
        num_gpu_blocks_override=200,
        **json.loads(settings),
    )
    params = SamplingParams(
        max_tokens=24, temperature=0.0, detokenize=False, ignore_eos=True, logprobs=0
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["cla2", "cla_norms", "lckv", "yoco", "yoco_retention"]
)
def test_two_workers_answer_as_the_definition(name: str, tmp_path: Path) -> None:
    made = make(name, tmp_path / "model")
    done = run(
        tmp_path,
        made.path,
        LENGTHS,
        tensor_parallel_size=2,
        # Early exits stay on.
        hf_overrides={k: v for k, v in made.exact.items() if k == "use_sequential"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [ln for ln in done.stdout.splitlines() if ln.startswith("@")]
    for length, (tokens, found) in zip(LENGTHS, json.loads(line[1:]), strict=True):
        assert len(tokens) == 24
        wanted = made.logprobs([*prompt(length, seed=length), *tokens[:-1]])
        wanted = wanted[length - 1 :]
        assert wanted.argmax(1).tolist() == tokens
        chosen = wanted.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert float((chosen - torch.tensor(found)).abs().max()) < TOLERANCE


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
            "yoco",
            {"tensor_parallel_size": 4},
            "--tensor-parallel-size 4 does not divide the 2 KV heads of this YOCO "
            "model; use a divisor",
        ),
        ("yoco", {"pipeline_parallel_size": 2}, "does not support pipeline"),
    ],
)
def test_refused_splits(
    name: str, settings: dict[str, int], said: str, tmp_path: Path
) -> None:
    made = make(name, tmp_path / "model")
    done = run(tmp_path, made.path, [3], **settings)
    assert done.returncode != 0
    assert said in done.stdout + done.stderr, done.stderr[-4000:]


@pytest.mark.slow
def test_stages_between_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CLA2 of five layers, cut after the fourth."""
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "4,1")
    made = make("cla2", tmp_path / "model")
    done = run(tmp_path, made.path, LENGTHS, pipeline_parallel_size=2)
    assert done.returncode == 0, done.stderr[-4000:]
