"""The bundled model's own task (see `tools.needle`)."""

from ...errors import ToolError
from ...needle import needle_prompts
from .base import Sample, Task, Tokenizer

NEEDLES = 8


def make(
    tokenizer: Tokenizer, length: int, count: int, seed: int, depth: float | None = None
) -> list[Sample]:
    """Prompts of exactly ``length`` tokens."""
    if depth is not None:
        raise ToolError("needle has no depths to choose; drop --depths")
    try:
        prompts = needle_prompts(
            num_tokens=length, needles=NEEDLES, count=count, seed=seed
        )
    except ValueError as error:
        raise ToolError(str(error)) from None
    samples = []
    for prompt in prompts:
        words = prompt.prompt.split(" ")
        samples.append(
            Sample(
                task="needle",
                context=" ".join(words[:-2]),
                question=" " + " ".join(words[-2:]),
                answers=(prompt.answer,),
                depth=prompt.depth,
                length=length,
                max_tokens=4,
            )
        )
    return samples


def score(output: str, sample: Sample) -> float:
    """1 if the output begins with the answer."""
    return float(output.strip().startswith(sample.answers[0]))


NEEDLE = Task("needle", "a fact among eight, for the bundled model", make, score)
