"""One arm in a process of its own: build vLLM, answer, write wave by wave.

``python -m vllm_kvcompress.tools.eval.engine_process JOB.json FD`` (see `engine`).
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vllm_kvcompress

from .conversation import (
    FORCED,
    Answer,
    Outcome,
    Question,
    Reference,
    Request,
    Rules,
    converse,
)
from .target import in_waves, kv_since

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

LEAST = -9999.0  # instead of minus infinity, as in vLLM's HTTP answers
Talk = Generator[Request, Answer, Outcome]


def _params(request: Request) -> "SamplingParams":
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0,
        max_tokens=request.max_tokens,
        ignore_eos=request.ignore_eos,
        logprobs=request.logprobs,
        detokenize=False,
        extra_args={FORCED: request.forced} if request.forced else None,
    )


def _answer(output: "RequestOutput") -> Answer:
    (only,) = output.outputs
    top = [
        {token: max(found.logprob, LEAST) for token, found in each.items()}
        for each in only.logprobs or ()
    ]
    return Answer(list(only.token_ids), top, only.finish_reason or "")


def run_wave(llm: "LLM", talks: Sequence[Talk]) -> list[Outcome]:
    """Lead conversations at once, each to its end."""
    engine = llm.llm_engine
    outcomes: dict[int, Outcome] = {}

    def send(number: int, answer: Answer | None) -> None:
        talk = talks[number]
        try:
            request = next(talk) if answer is None else talk.send(answer)
        except StopIteration as end:
            outcomes[number] = end.value
        else:
            prompt = {"prompt_token_ids": request.prompt}
            engine.add_request(str(number), prompt, _params(request))

    for number in range(len(talks)):
        send(number, None)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                send(int(output.request_id), _answer(output))
    return [outcomes[number] for number in range(len(talks))]


def execute(job: Mapping[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Do a job as `engine.Engine.waves` writes it."""
    from vllm import LLM

    llm = LLM(**job["llm"])
    rules = Rules(**job["rules"])
    work: list[tuple[dict[str, Any], dict[str, Any] | None]] = job["work"]
    for wave in in_waves(work, job["batch"]):
        before = vllm_kvcompress.stats(llm) if job["compresses"] else None
        start = time.perf_counter()
        talks = [
            converse(
                Question(**asked), rules, Reference.from_json(known) if known else None
            )
            for asked, known in wave
        ]
        outcomes = run_wave(llm, talks)
        seconds = time.perf_counter() - start
        after = vllm_kvcompress.stats(llm) if job["compresses"] else None
        kv = kv_since(before, after) if before and after else None
        emit({"outcomes": outcomes, "kv": kv, "seconds": seconds})


def main() -> int:
    """Read the job, do it, or write the reason why not."""
    job = json.loads(Path(sys.argv[1]).read_text())
    with os.fdopen(int(sys.argv[2]), "w") as pipe:

        def emit(line: dict[str, Any]) -> None:
            print(json.dumps(line), file=pipe, flush=True)

        try:
            execute(job, emit)
        except BrokenPipeError:
            return 1
        except Exception as error:
            traceback.print_exc()
            reason = str(error).splitlines() or [""]
            emit({"error": f"{type(error).__name__}: {reason[0]}"})
    return 0


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    sys.exit(main())
