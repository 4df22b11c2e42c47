"""Serves on some tensor-parallel workers. Run by `test_parallel`.

    python parallel_cases.py MODEL WORKERS STAGES SETTINGS LENGTHS OUTPUT

There are as many WORKERS on each pipeline stage. OUTPUT holds the answers, what each
worker has kept, and how many blocks went where.
"""

import json
import sys
from pathlib import Path
from typing import Any

# On the path for these only: folders of the root would shadow packages.
sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.engine import kept  # noqa: E402
from tests.engine.conftest import (  # noqa: E402
    engine,
    free_blocks,
    preemptions,
    prompt,
    scheduler,
)

del sys.path[0]


def main(
    model: str, workers: str, stages: str, settings: str, lengths: str, output: str
) -> None:
    """Serve prompts of some lengths at once, by all methods in turns."""
    import torch
    from vllm import SamplingParams

    from vllm_kvcompress import stats

    config = json.loads(settings)
    methods = [config["method"], *config.get("request_methods", [])]
    prompts = [prompt(n, seed=n) for n in json.loads(lengths) for _ in methods]
    params = [
        SamplingParams(
            max_tokens=64,
            temperature=0.0,
            detokenize=False,
            ignore_eos=True,
            extra_args={
                "kv_compression": methods[index % len(methods)],
                "kv_compression_usage": True,
            },
        )
        for index in range(len(prompts))
    ]
    with engine(
        Path(model),
        tensor_parallel_size=int(workers),
        pipeline_parallel_size=int(stages),
        max_num_seqs=64,
        # vLLM's CPU worker runs no pipeline eagerly.
        enforce_eager=False,
        compilation_config={"backend": "eager"},
        additional_config={"kv_compression": config},
    ) as llm:
        llm.collective_rpc(kept.listen)
        before, overflow = free_blocks(llm), _overflow(llm)
        undone = preemptions(llm)
        outputs = llm.generate(
            [{"prompt_token_ids": tokens} for tokens in prompts], params, use_tqdm=False
        )
        told = [output.kv_transfer_params["kv_compression"] for output in outputs]
        found = {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "told": [usage["blocks_freed"] for usage in told],
            "kept": llm.collective_rpc(kept.kept),
            "compressions": stats(llm)["compressions"],
            "blocks_freed": stats(llm)["blocks_freed"],
            "preemptions": len(undone),
            "overflow": overflow,
            "left": before - free_blocks(llm),
        }
    torch.save(found, output)


def _overflow(llm: Any) -> dict[tuple[str, int], int]:
    """Collects the blocks that a request's groups hold beyond the mean of all heads."""
    found: dict[tuple[str, int], int] = {}

    def listen(group: int, manager: Any) -> None:
        original = manager.settle

        def settle(request_id: str, directive: Any, used: int) -> bool:
            found[request_id.partition("-")[0], group] = used
            return original(request_id, directive, used)

        manager.settle = settle

    for group, manager in scheduler(llm)._managers.items():
        listen(group, manager)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
