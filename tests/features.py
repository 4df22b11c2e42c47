"""What works with what: one table. Each cell is a test, and docs/matrix.md shows it.

A cell is a feature of vLLM and a method of ours. It *works* if requests that are
compressed by the method get the same tokens with the feature as without; it is
*refused* at start-up, or nobody has been able to run it yet.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.matrix import METHODS

NAMES = list(dict.fromkeys(entry["method"] for entry in METHODS))
EVERY = "every method"


@dataclass(frozen=True)
class Feature:
    """A row of the table.

    Attributes:
        title: What users call it.
        engine: Keywords of `vllm.LLM` that switch it on.
        how: How `feature_cases` serves requests with it.
        refused: Words of the refusal, by method or for `EVERY`.
        elsewhere: Tests that prove it, by method or for `EVERY`, where how requests
            are served is too special for `feature_cases`.
        unrun: Why nobody has run it.
    """

    title: str
    engine: Mapping[str, Any] = field(default_factory=dict)
    how: str = "plain"
    refused: Mapping[str, str] = field(default_factory=dict)
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    unrun: str = ""

    def status(self, method: str) -> str:
        """``works``, ``refused`` or ``not yet run``."""
        if self.unrun:
            return "not yet run"
        return "refused" if self.refusal(method) else "works"

    def refusal(self, method: str) -> str | None:
        """Words of the sentence, if the cell is refused."""
        return self.refused.get(method) or self.refused.get(EVERY)

    def proof(self, method: str) -> str | None:
        """The test elsewhere, if there is one."""
        return self.elsewhere.get(method) or self.elsewhere.get(EVERY)


CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
FEATURES = [
    Feature("prefix caching", how="hits"),
    Feature("prefix caching off", {"enable_prefix_caching": False}),
    Feature("chunked prefill", how="chunks"),
    Feature("preemption", how="preempted"),
    Feature("asynchronous scheduling", how="asynchronous"),
    Feature("torch.compile", {"enforce_eager": False}),
    Feature("parallel sampling", how="samples"),
    Feature("prompt logprobs", how="prompt_logprobs"),
    Feature("structured output", how="structured"),
    Feature("beam search", how="beams"),
    Feature("priority scheduling", {"scheduling_policy": "priority"}, "priorities"),
    Feature("LoRA", {"enable_lora": True, "max_lora_rank": 8}, "lora"),
    Feature("fp8 KV cache", {"kv_cache_dtype": "fp8"}, "fp8"),
    Feature(
        "tensor parallel, 2 workers",
        {"tensor_parallel_size": 2},
        "workers",
        elsewhere={
            "ada_snapkv": "tests/engine/test_parallel.py::"
            "test_each_worker_deals_out_to_its_own_heads",
        },
    ),
    Feature(
        "KV connectors",
        {"kv_transfer_config": CONNECTOR},
        refused={EVERY: "KV connectors"},
    ),
    Feature(
        "KV offloading", {"kv_offloading_size": 1.0}, refused={EVERY: "KV offloading"}
    ),
    Feature("sleep mode", unrun="stock vLLM has it on GPUs only"),
]


def table() -> str:
    """The table in Markdown."""
    heads = [f"`{name}`" for name in NAMES]
    lines = [
        "| | " + " | ".join(heads) + " |",
        "|---|" + "---|" * len(heads),
    ]
    for feature in FEATURES:
        cells = [feature.status(name) for name in NAMES]
        lines.append(f"| {feature.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
