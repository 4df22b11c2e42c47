"""The small trained models of tests/models, in plain torch.

Their answers need what layers share, so that engines can be judged by them.
"""

import json
from pathlib import Path

import pytest
import torch

from vllm_kvcompress.models.reference.llama import (
    ClaLlamaForCausalLM,
    LCKVLlamaForCausalLM,
)
from vllm_kvcompress.models.reference.yoco import YocoForCausalLM
from vllm_kvcompress.tools.needle import accuracy, needle_prompts

MODELS = Path(__file__).parents[1] / "models"
CLASSES = {
    "cla": ClaLlamaForCausalLM,
    "lckv": LCKVLlamaForCausalLM,
    "yoco": YocoForCausalLM,
}
PROMPTS = needle_prompts(num_tokens=256, needles=4, count=8, seed=2)


def load(name):
    return CLASSES[name].from_pretrained(MODELS / name, dtype=torch.float32).eval()


@torch.no_grad()
def answered(model, **options):
    """The share of prompts, both words greedily."""
    outputs = []
    tokens = torch.tensor([prompt.token_ids for prompt in PROMPTS])
    for _ in range(2):
        best = model(tokens, **options).logits[:, -1].argmax(-1)
        tokens = torch.cat([tokens, best[:, None]], dim=1)
        outputs.append(best)
    return accuracy(PROMPTS, torch.stack(outputs, dim=1).tolist())


@pytest.mark.parametrize("name", CLASSES)
def test_answers_needle_prompts(name):
    assert answered(load(name)) == 1


@pytest.mark.parametrize("name", CLASSES)
def test_is_small_and_says_how_it_was_made(name):
    assert (MODELS / name / "model.safetensors").stat().st_size < 2.5e6
    told = json.loads((MODELS / name / "training.json").read_text())
    assert "train_shared_model.py" in told["command"]
    assert told["answered"]["1024"] >= 0.95


def test_cla_answers_by_its_readers():
    for layer in (1, 3):
        model = load("cla")
        assert layer not in model.config.layer_map.writers
        model.model.layers[layer].self_attn.o_proj.weight.data.zero_()
        assert answered(model) < 0.2


def test_lckv_answers_by_what_it_reads_ahead():
    model = load("lckv")
    assert answered(model, passes=1) < 0.2
    assert answered(model, passes=3) == 1


def test_yoco_answers_by_its_global_kv():
    model = load("yoco")
    model.cross_decoder.v_proj.weight.data.zero_()
    assert answered(model) < 0.2
