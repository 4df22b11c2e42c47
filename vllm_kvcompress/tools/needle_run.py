"""Needle questions through real vLLM: the same job for every arm, and its grade."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .arms import Job, run_arm
from .bench_model import BenchModel, bench_model
from .errors import ToolError
from .needle import NeedlePrompt, accuracy, model_path, needle_prompts


@dataclass(frozen=True)
class NeedleRun:
    """What all arms of a comparison answer.

    Attributes:
        prompts: The questions.
        job: The same, for `run_arm`.
        model: The bundled one.
    """

    prompts: list[NeedlePrompt]
    job: Job
    model: BenchModel

    @classmethod
    def prepare(
        cls, *, prompt_len: int, count: int, needles: int, max_tokens: int, **llm: Any
    ) -> "NeedleRun":
        """Make the prompts, and a job whose KV space holds them all.

        Args:
            prompt_len: Tokens of each prompt.
            count: Number of prompts.
            needles: Facts in each.
            max_tokens: Output tokens of each.
            **llm: More keyword arguments for `vllm.LLM`.

        Raises:
            ToolError: There are no such prompts.
        """
        sizes = {"num_tokens": prompt_len, "needles": needles}
        try:
            prompts = needle_prompts(**sizes, count=count, seed=0)
            warmup = needle_prompts(**sizes, count=1, seed=1)
        except ValueError as error:
            raise ToolError(str(error)) from None
        model = bench_model(model_path())
        length = prompt_len + max_tokens
        job = Job(
            llm={
                "model": model.location,
                "dtype": model.dtype,
                "skip_tokenizer_init": True,
                "max_model_len": length,
                "kv_cache_memory_bytes": (count + 2)
                * (length + 128)
                * model.token_bytes,
                **llm,
            },
            passes=[[prompt.token_ids for prompt in prompts]],
            warmup=[prompt.token_ids for prompt in warmup],
            max_tokens=max_tokens,
        )
        return cls(prompts, job, model)

    def run(
        self,
        name: str,
        arm: dict[str, Any],
        *,
        report: Callable[[float], None],
        verbose: bool = False,
    ) -> dict[str, float]:
        """Run one arm (see `run_arm`) and grade its answers.

        A KV block counts as one of all layers, also where tiers have their own.
        """
        done = run_arm(name, self.job, arm, report=report, verbose=verbose)
        held = done.measures["kv_bytes_held"] / done.measures["decode_requests"]
        whole_block = done.engine["block_size"] * self.model.token_bytes
        tier_share = done.engine["block_bytes"] / whole_block
        return {
            "accuracy": accuracy(self.prompts, done.outputs[0]),
            "kv_blocks_per_request": done.measures["kv_blocks_per_request"]
            * tier_share,
            "kv_mib_per_request": held / 2**20,
            "decode_tokens_per_s": done.measures["decode_tokens_per_s"],
        }
