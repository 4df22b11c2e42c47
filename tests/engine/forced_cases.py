"""Forced tokens in a runner of vLLM: ``forced_cases.py v1|v2 MODEL OUTPUT``.

Two short prompts that are forced and one that is not, then the three again, so that
slots are used a second time; scheduled asynchronously, one prompt in pieces.
"""

import json
import sys
from pathlib import Path
from typing import Any

# On the path for one import only: folders of the root would shadow packages.
sys.path[0] = str(Path(__file__).parents[2])
from tests.engine.v2_harness import boot  # noqa: E402

del sys.path[0]

PROMPTS = [[1, *range(10, 10 + n)] for n in (5, 40, 9)]
FORCED = [[9, 2, 7, 2], [], [200, 8]]


def about(made: Any) -> dict[str, Any]:
    """What was generated, and which tokens the model would have chosen itself."""
    pairs = list(zip(made.token_ids, made.logprobs, strict=True))
    best = [max(each.logprob for each in found.values()) for _, found in pairs]
    own = [
        found[token].logprob == top
        for (token, found), top in zip(pairs, best, strict=True)
    ]
    return {"tokens": list(made.token_ids), "own": own}


def main(runner: str, model: str, output: str) -> None:
    """Generate, and write the tokens."""
    switches = boot(v2=runner == "v2")
    switches.async_scheduling = True
    from vllm import LLM, SamplingParams

    from vllm_kvcompress.tools.eval.engine import PROCESSOR

    llm = LLM(
        model,
        logits_processors=[PROCESSOR],
        enforce_eager=True,
        max_model_len=128,
        max_num_batched_tokens=32,
        max_num_seqs=4,
        kv_cache_memory_bytes=2**24,
    )
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=6,
            ignore_eos=True,
            logprobs=1,
            extra_args={"forced_tokens": forced} if forced else None,
        )
        for forced in FORCED
    ]
    prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    answers = []
    for order in ([0, 1, 2], [2, 1, 0]):
        found = llm.generate([prompts[i] for i in order], [params[i] for i in order])
        made = [one.outputs[0] for one in found]
        answers.append({i: about(one) for i, one in zip(order, made, strict=True)})
    Path(output).write_text(json.dumps({"forced": FORCED, "answers": answers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
