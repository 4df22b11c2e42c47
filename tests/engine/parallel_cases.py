"""Serves on some tensor-parallel workers. Run by `test_parallel`.

    python parallel_cases.py MODEL WORKERS SETTINGS LENGTHS OUTPUT

OUTPUT holds the answers, what each worker has kept, and blocks.
"""

import json
import sys
from pathlib import Path
from typing import Any

# On the path for these only: folders of the root would shadow packages.
sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.engine import kept  # noqa: E402
from tests.engine.conftest import engine, generate, prompt, scheduler  # noqa: E402

del sys.path[0]


def main(model: str, workers: str, settings: str, lengths: str, output: str) -> None:
    """Serve prompts of some lengths at once."""
    import torch

    from vllm_kvcompress import stats

    with engine(
        Path(model),
        tensor_parallel_size=int(workers),
        num_gpu_blocks_override=200,
        additional_config={"kv_compression": json.loads(settings)},
    ) as llm:
        llm.collective_rpc(kept.listen)
        pool = scheduler(llm).kv_cache_manager.block_pool
        before, freed = pool.get_num_free_blocks(), list[int]()
        _count(scheduler(llm)._managers.values(), freed)
        prompts = [prompt(n, seed=n) for n in json.loads(lengths)]
        answers = generate(llm, prompts, 100)
        found: dict[str, Any] = {
            "tokens": [answer.tokens for answer in answers],
            "logprobs": [answer.logprobs for answer in answers],
            "kept": llm.collective_rpc(kept.kept),
            "compressions": stats(llm)["compressions"],
            "blocks_freed": stats(llm)["blocks_freed"],
            "overflow": freed,
            "left": before - pool.get_num_free_blocks(),
        }
    torch.save(found, output)


def _count(managers: Any, used: list[int]) -> None:
    """Collect how many blocks are held beyond the mean of all heads."""
    for manager in managers:
        settle = manager.settle

        def settling(request_id: str, directive: Any, count: int, settle: Any) -> bool:
            used.append(count)
            return settle(request_id, directive, count)

        manager.settle = lambda *args, settle=settle: settling(*args, settle)


if __name__ == "__main__":
    main(*sys.argv[1:])
