"""The servers of `serving` on another runner, asynchronous and in little space.

Run as a script by `test_serving`: see `v2_harness`, which changes a process for good.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

# On the path for one import only: folders of the root would shadow packages.
sys.path[0] = str(Path(__file__).parents[2])
from tests.engine import v2_harness  # noqa: E402

del sys.path[0]


def serve(model: str, settings: dict[str, Any], family: str) -> dict[str, Any]:
    """All requests of one server at once, and what served them."""
    from tests.engine.conftest import engine, free_blocks, preemptions
    from tests.engine.pictures import flags, illustrate
    from tests.engine.serving import ENGINE, ask, little_space, requests
    from vllm_kvcompress import stats

    config = {"kv_compression": settings}
    own = {**ENGINE, **(flags(family) if family else {})}
    with engine(Path(model), additional_config=config, **own) as llm:
        core = llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        asked, before = requests(settings), free_blocks(llm)
        if family:
            asked = illustrate(asked, family)
        preempted = preemptions(llm)
        with little_space(llm, asked):
            answers = ask(llm, asked)
        return {
            # Ours, its two mix-ins, then vLLM's.
            "runner": type(runner).__mro__[3].__module__,
            "scheduler": type(core.scheduler).__name__,
            "answers": [asdict(answer) for answer in answers],
            "undone": preempted,
            "compressions": stats(llm)["compressions"],
            "leaked": before - free_blocks(llm),
        }


def main(runner: str, model: str, output: str, family: str, *names: str) -> None:
    """Serve on ``v1`` or ``v2``; with pictures, if a family is named."""
    v2_harness.boot(v2=runner == "v2").async_scheduling = True
    import torch

    from tests.engine.serving import SERVERS

    torch.save({name: serve(model, SERVERS[name], family) for name in names}, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
