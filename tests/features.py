"""What works with what: one table. Each cell is a test, and docs/matrix.md shows it.

A cell is a feature of vLLM and a method of ours. It *works* if requests that are
compressed by the method get the same tokens with the feature as without; it is
*refused* at start-up.
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
        cannot: Servers of `serving` that are refused with it.
        note: What else users should know.
    """

    title: str
    engine: Mapping[str, Any] = field(default_factory=dict)
    how: str = "plain"
    refused: Mapping[str, str] = field(default_factory=dict)
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    cannot: tuple[str, ...] = ()
    note: str = ""

    def status(self, method: str) -> str:
        """``works`` or ``refused``."""
        return "refused" if self.refusal(method) else "works"

    def refusal(self, method: str) -> str | None:
        """Words of the sentence, if the cell is refused."""
        return self.refused.get(method) or self.refused.get(EVERY)

    def proof(self, method: str) -> str | None:
        """The test elsewhere, if there is one."""
        return self.elsewhere.get(method) or self.elsewhere.get(EVERY)


CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
STAGES = {
    "pipeline_parallel_size": 2,
    # vLLM's CPU worker runs no pipeline eagerly.
    "enforce_eager": False,
    "compilation_config": {"backend": "eager"},
}
FEATURES = [
    Feature("prefix caching", how="hits", note="pruned prompts get no hits"),
    Feature("prefix caching off", {"enable_prefix_caching": False}),
    Feature("chunked prefill", how="chunks"),
    Feature("preemption", how="preempted"),
    Feature("asynchronous scheduling", how="asynchronous"),
    Feature("torch.compile", {"enforce_eager": False}),
    Feature("parallel sampling", how="samples"),
    Feature("prompt logprobs", how="prompt_logprobs"),
    Feature("structured output", how="structured"),
    Feature(
        "beam search",
        how="beams",
        note="beams grow by requests for one token, which are never compressed",
    ),
    Feature("priority scheduling", {"scheduling_policy": "priority"}, "priorities"),
    Feature(
        "LoRA",
        {"enable_lora": True, "max_lora_rank": 8},
        "lora",
        cannot=("pruning",),
        note="`pyramidinfer` with `prune: false`",
    ),
    Feature(
        "multimodal prompts",
        elsewhere={EVERY: "tests/engine/test_pictures.py::test_all_at_once"},
        note="images, run with Idefics3, PaddleOCR-VL, LLaVA, Qwen2-VL and Qwen3-VL; "
        "refused: models whose images see all of themselves (Gemma 3, PaliGemma), and "
        "encoder-decoder models (Whisper)",
    ),
    Feature(
        "prompts given as embeddings", {"enable_prompt_embeds": True}, "embeddings"
    ),
    Feature("fp8 KV cache", {"kv_cache_dtype": "fp8"}, "codes"),
    Feature(
        "speculative decoding, n-gram",
        elsewhere={EVERY: "tests/engine/test_drafts.py::test_every_method"},
        note="drafts pause while a method observes its window",
    ),
    Feature(
        "speculative decoding, a draft model",
        elsewhere={EVERY: "tests/engine/test_drafts.py::test_runners"},
        note="its own KV stays whole",
    ),
    Feature(
        "speculative decoding, EAGLE, MTP, Medusa",
        refused={EVERY: "speculative decoding by"},
        elsewhere={EVERY: "tests/unit/test_refusals.py::test_refused"},
    ),
    Feature(
        "tensor parallel, 2 workers",
        {"tensor_parallel_size": 2},
        "workers",
        note="each KV head keeps the same tokens; `ada_snapkv` takes more blocks where "
        "the heads of one worker keep more than those of another",
    ),
    Feature(
        "pipeline parallel, 2 stages",
        STAGES,
        "workers",
        elsewhere={
            "minicache": "tests/engine/test_pipeline.py::test_two_stages_answer_as_one"
        },
        cannot=("pruning", "minicache", "selecting"),
        note="`pyramidinfer` with `prune: false`; a pair of `minicache` and a tier of "
        "`ada_snapkv` lie on one stage; budgets by layer gain no room",
    ),
    Feature(
        "data parallel",
        elsewhere={
            EVERY: "tests/engine/test_data_parallel.py::"
            "test_each_engine_compresses_and_counts"
        },
        note="one test for all: engines do not know of one another",
    ),
    Feature(
        "Ray executor",
        elsewhere={EVERY: "tests/engine/test_ray.py::test_workers_of_ray_compress"},
        note="one test for all, with two workers; vLLM refuses Ray on CPUs, so the "
        "test gives the CPU a device name",
    ),
    Feature(
        "KV offloading",
        elsewhere={
            EVERY: "tests/engine/test_offloading.py::test_what_was_stored_is_loaded"
        },
        note="`--kv-offloading-size`; whole prompts stay in CPU memory. On CPUs vLLM "
        "offloads nothing, so the test copies in the place of CUDA",
    ),
    Feature(
        "KV connectors of other kinds, P/D disaggregation",
        {"kv_transfer_config": CONNECTOR},
        refused={EVERY: "the KV connector ExampleConnector"},
        note="they read a request's blocks by number after it has given them back, or "
        "load so much of a prompt that no observation window is computed",
    ),
    Feature(
        "sleep mode",
        how="asleep",
        note="requests in flight are computed anew; CPUs keep their memory, "
        "so the test overwrites it",
    ),
]


INTRODUCTION = """# Support matrix

Each cell is a test on CPUs ([table](../tests/features.py)). *Works*: requests that the
method compresses get the same tokens with the feature as without. *Refused*: the server
does not start, and says in one sentence what to change. CUDA graphs, fused kernels and
attention backends of GPUs have not yet run on one.

"""


def page() -> str:
    """docs/matrix.md."""
    heads = [f"`{name}`" for name in NAMES]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    notes = []
    for feature in FEATURES:
        mark = ""
        if feature.note:
            notes.append(f"{len(notes) + 1}. {feature.title}: {feature.note}")
            mark = f" ({len(notes)})"
        cells = [feature.status(name) for name in NAMES]
        lines.append(f"| {feature.title}{mark} | " + " | ".join(cells) + " |")
    return INTRODUCTION + "\n".join([*lines, "", *notes]) + "\n"


if __name__ == "__main__":
    print(page(), end="")
