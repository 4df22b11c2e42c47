"""Cases for `test_shared_v2`, run as a script: results are JSON in a file.

See `v2_harness`, which changes the process for good.
"""

import json
import sys
from pathlib import Path
from typing import Any

# On the path for one import only: folders of the root would shadow packages.
sys.path[0] = str(Path(__file__).parents[2])
from tests.engine import v2_harness  # noqa: E402
from tests.engine.shared_models import Made, make  # noqa: E402

del sys.path[0]


def _worst(made: Made, llm: Any, lengths: list[int], count: int) -> dict[str, Any]:
    """How far the answers' logits are from the definition's, by length."""
    from tests.engine.conftest import generate, prompt

    prompts = [prompt(n, seed=n) for n in lengths]
    errors = {}
    for tokens, answer in zip(prompts, generate(llm, prompts, count), strict=True):
        error = made.error([*tokens, *answer.tokens], answer.logprobs)
        errors[len(tokens)] = error
    return {"errors": errors}


def case(made: Made, **settings: Any) -> dict[str, Any]:
    """A mixed batch, then chunks; with exact prompts but early exits."""
    from tests.engine.conftest import chunks, engine

    exact = {k: v for k, v in made.exact.items() if k != "early_exit"}
    with engine(
        made.path,
        hf_overrides=exact,
        max_model_len=128,
        max_num_batched_tokens=128,
        max_num_seqs=4,
        num_gpu_blocks_override=60,
        **settings,
    ) as llm:
        core = llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        with chunks(llm, 16):
            small = _worst(made, llm, [3, 20], 2)
        llm.reset_prefix_cache()
        groups = [group for groups in runner.attn_groups for group in groups]
        return {
            "runner": [each.__module__ for each in type(runner).__mro__],
            "backends": sorted({group.backend.__name__ for group in groups}),
            "whole": _worst(made, llm, [1, 2, 17], 3)["errors"],
            "chunks": small["errors"],
        }


def main(attention: str, names: str, folder: str) -> None:
    """Run the models ``names`` on V2 with one backend (``CPU_ATTN`` or another)."""
    switches = v2_harness.boot(v2=True)
    switches.attention = None if attention == "CPU_ATTN" else attention
    results = {name: case(make(name, Path(folder) / name)) for name in names.split(",")}
    (Path(folder) / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
