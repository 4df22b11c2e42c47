"""The bundled needle model answers its task, and is what its script makes."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from vllm_kvcompress.tools import needle
from vllm_kvcompress.tools.needle import NeedlePrompt, accuracy, needle_prompts

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_needle_model.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_needle_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(needle.model_path())


def answers(
    prompts: list[NeedlePrompt], dtype: torch.dtype = torch.float32
) -> list[list[int]]:
    """Generate greedily to the end of the text, or 8 tokens."""
    model = LlamaForCausalLM.from_pretrained(needle.model_path(), dtype=dtype)
    outputs = []
    for prompt in prompts:
        tokens = torch.tensor([prompt.token_ids])
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=8,
            do_sample=False,
        )
        outputs.append(output[0, tokens.shape[1] :].tolist())
    return outputs


def test_checkpoint_is_what_the_script_makes(
    script: ModuleType, tmp_path: Path
) -> None:
    script.main(["--out", str(tmp_path)])
    bundled = Path(needle.model_path())
    made = load_file(tmp_path / "model.safetensors")
    for name, tensor in load_file(bundled / "model.safetensors").items():
        assert torch.equal(tensor, made.pop(name)), name
    assert not made
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (bundled / name).read_text() == (tmp_path / name).read_text()
    assert sum(file.stat().st_size for file in bundled.iterdir()) <= 8 * 2**20


def test_another_seed_makes_another_model(script: ModuleType) -> None:
    weights = [script.make_model(seed).lm_head.weight for seed in (0, 1)]
    assert not torch.equal(*weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_answers_and_ends(
    dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = needle_prompts(num_tokens=1024, count=20)
    outputs = answers(prompts, dtype)
    assert accuracy(prompts, outputs) >= 0.99
    for prompt, output in zip(prompts, outputs, strict=True):
        assert tokenizer.decode(output) == f"{prompt.answer} . </s>"


@pytest.mark.slow
def test_answers_long_prompts() -> None:
    prompts = needle_prompts(num_tokens=32_768, needles=16, count=1)
    assert accuracy(prompts, answers(prompts)) == 1


@pytest.mark.parametrize("num_tokens", [256, 1000, 1024, 1027, 8192])
def test_prompts_have_the_length_and_hide_the_answer(num_tokens: int) -> None:
    needles = 4 if num_tokens == 256 else 8
    recent = 600 if num_tokens >= 960 else num_tokens // 2
    prompts = needle_prompts(num_tokens=num_tokens, needles=needles, count=20, seed=3)
    for prompt in prompts:
        ids = prompt.token_ids
        assert len(ids) == num_tokens
        assert len(prompt.answer_ids) == 2
        assert not set(prompt.answer_ids) & set(ids[-recent:])
        start = round(prompt.depth * num_tokens)
        assert ids[start + 1] == ids[-1]
        assert ids[start + 2 : start + 4] == prompt.answer_ids
        assert prompt.prompt.count(needle.REMEMBER) == needles


def test_needles_lie_everywhere() -> None:
    depths = [p.depth for p in needle_prompts(num_tokens=8192, count=200)]
    assert min(depths) < 0.1 and max(depths) > 0.85
    assert all(
        sum(tenth <= 10 * depth < tenth + 1 for depth in depths) for tenth in range(9)
    )


def test_prompts_follow_from_the_seed() -> None:
    first, again = (needle_prompts(num_tokens=512, count=2, seed=5) for _ in range(2))
    assert first == again
    assert first != needle_prompts(num_tokens=512, count=2, seed=6)


@pytest.mark.parametrize("wrong", [{"needles": 0}, {"needles": 49}, {"num_tokens": 64}])
def test_impossible_tasks_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        needle_prompts(**{"num_tokens": 4096, "count": 1, **wrong})


def test_accuracy_wants_the_whole_answer() -> None:
    prompts = needle_prompts(num_tokens=512, count=4)
    right = prompts[0].answer_ids
    outputs = [[*right, 5, 2], prompts[1].answer_ids[:1], [], [0, 0]]
    assert accuracy(prompts, outputs) == 0.25


def test_tokenizer_round_trip(tokenizer: PreTrainedTokenizerBase) -> None:
    (prompt,) = needle_prompts(num_tokens=512, count=1)
    assert tokenizer(prompt.prompt).input_ids == prompt.token_ids
    assert tokenizer.decode(prompt.token_ids[1:]) == prompt.prompt
    assert tokenizer.decode(prompt.answer_ids) == prompt.answer
    readable = tokenizer("Remember Paris: copper, falcon.\nRecall Paris?").input_ids
    assert (
        readable == tokenizer("remember paris copper falcon . recall paris").input_ids
    )
    assert tokenizer.unk_token_id in tokenizer("recall atlantis").input_ids


def test_chat_template_ends_with_the_question(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    (prompt,) = needle_prompts(num_tokens=512, count=1)
    chat = [{"role": "user", "content": prompt.prompt}]
    text = tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == prompt.token_ids
