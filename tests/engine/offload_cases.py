"""A server that offloads, asynchronous. Run by `test_offloading_async`.

    python offload_cases.py v1|v2 MODEL OUTPUT

OUTPUT holds answers without offloading, with it, and again from the CPU's memory.
"""

import sys
from dataclasses import asdict
from pathlib import Path

# On the path for one import only: folders of the root would shadow packages.
sys.path[0] = str(Path(__file__).parents[2])
from tests.engine import v2_harness  # noqa: E402

del sys.path[0]


def main(runner: str, model: str, output: str) -> None:
    """Serve a server's longest prompts."""
    v2_harness.boot(v2=runner == "v2").async_scheduling = True
    import pytest
    import torch

    from tests.engine import offload_harness
    from tests.engine.conftest import engine, scheduler
    from tests.engine.serving import ENGINE, SERVERS, ask, requests

    offload_harness.boot(pytest.MonkeyPatch())
    asked = requests(SERVERS["even"])[-3:]
    settings = {**ENGINE, "additional_config": {"kv_compression": SERVERS["even"]}}
    with engine(Path(model), **settings) as llm:
        answers = [ask(llm, asked)]
    transfer = offload_harness.transfer_config()
    with engine(Path(model), kv_transfer_config=transfer, **settings) as llm:
        with offload_harness.tight(llm, asked):
            answers.append(ask(llm, asked))
        offload_harness.drain(llm)
        assert scheduler(llm).reset_prefix_cache()
        answers.append(ask(llm, asked))
        found = {
            "answers": [[asdict(answer) for answer in each] for each in answers],
            "hits": [request.hits for request in asked],
            "scheduler": type(scheduler(llm)).__name__,
            "fenced": scheduler(llm).defer_block_free,
        }
    torch.save(found, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
