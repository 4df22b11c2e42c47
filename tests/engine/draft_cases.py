"""Cases for `test_drafts`, run as a script: results are JSON in a file.

Each has a process to itself: `v2_harness` changes it for good, and vLLM's n-gram
drafts leave one in which no other engine starts.
"""

import json
import sys
from pathlib import Path
from typing import Any

# On the path for one import only: folders of the root would shadow packages.
sys.path[0] = str(Path(__file__).parents[2])
from tests.engine import v2_harness  # noqa: E402

del sys.path[0]


def _answers(llm: Any, lengths: list[int], count: int) -> dict[str, Any]:
    """Answers to prompts that repeat themselves, served at once."""
    from vllm import SamplingParams

    from tests.engine.conftest import prompt

    params = SamplingParams(
        max_tokens=count, temperature=0.0, detokenize=False, ignore_eos=True
    )
    prompts = [(prompt(30, seed=n) * (n // 30 + 1))[:n] for n in lengths]
    given = [{"prompt_token_ids": tokens} for tokens in prompts]
    outputs = llm.generate(given, params, use_tqdm=False)
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "cached": sum(output.num_cached_tokens for output in outputs),
    }


def _serve(model: str, case: dict[str, Any], engine_args: dict[str, Any]) -> Any:
    from tests.engine.conftest import engine, free_blocks, preemptions, scheduler
    from vllm_kvcompress import stats

    settings = {
        "additional_config": {"kv_compression": case["settings"]},
        "max_model_len": 640,
        "max_num_seqs": 8,
        "disable_log_stats": False,
        **engine_args,
    }
    with engine(Path(model), **settings) as llm:
        before, preempted = free_blocks(llm), preemptions(llm)
        first = _answers(llm, case["lengths"], case["count"])
        again = _answers(llm, case["lengths"][::-1], case["count"])
        counted = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
        return {
            "first": first,
            "again": again,
            "stats": stats(llm),
            "leaked": before - free_blocks(llm),
            "preempted": len(preempted),
            "runner": type(runner.worker.model_runner).__mro__[3].__module__,
            "scheduler": type(scheduler(llm)).__name__,
            "drafted": counted.get("vllm:spec_decode_num_draft_tokens", 0),
            "accepted": counted.get("vllm:spec_decode_num_accepted_tokens", 0),
        }


def main(runner: str, given: str, output: str) -> None:
    """Serve without drafts in ample space, then with them as the case says."""
    switches, case = v2_harness.boot(v2=runner == "v2"), json.loads(given)
    plain = _serve(case["model"], case, {})
    switches.async_scheduling = case["asynchronous"]
    drafted = _serve(case["model"], case, case["engine"])
    Path(output).write_text(json.dumps({"plain": plain, "drafted": drafted}))


if __name__ == "__main__":
    main(*sys.argv[1:])
