"""Every feature of vLLM with every method: the cells of `tests.features`."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import kept
from tests.engine.conftest import VOCAB, Answer
from tests.engine.feature_cases import RANK
from tests.engine.serving import SERVERS, requests
from tests.features import FEATURES, NAMES, Feature

CASES = Path(__file__).with_name("feature_cases.py")
CELLS = [(feature, method) for feature in FEATURES for method in NAMES]
RUN = [
    (feature, method)
    for feature, method in CELLS
    if feature.status(method) == "works" and not feature.proof(method)
]


pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def _tokenizer(path: Path) -> None:
    """A word for every token: ``<0>``, ``<1>`` and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"<{number}>": number for number in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<0>", eos_token="<1>"
    ).save_pretrained(path)


def _adapter(path: Path, merged: Path) -> None:
    """A LoRA adapter for the attention of ``path``, and the model with it merged."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig

    weights = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    adapter = {}
    for name, weight in weights.items():
        if "self_attn" not in name or "norm" in name:
            continue
        rows, columns = weight.shape
        down = torch.randn(RANK, columns, generator=generator) / columns**0.5
        up = torch.randn(rows, RANK, generator=generator) * weight.std()
        own = f"base_model.model.{name.removesuffix('.weight')}"
        adapter |= {f"{own}.lora_A.weight": down, f"{own}.lora_B.weight": up}
        weights[name] = weight + up @ down
    (path / "adapter").mkdir()
    save_file(adapter, path / "adapter" / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "bias": "none",
    }
    (path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    AutoConfig.from_pretrained(path).save_pretrained(merged)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="session")
def models(llama: Path, tmp_path_factory: Any) -> dict[str, Path]:
    """The model that features run on, and what LoRA must equal."""
    merged = tmp_path_factory.mktemp("merged")
    _tokenizer(llama)
    _adapter(llama, merged)
    return {"plain": llama, "merged": merged}


@pytest.fixture(scope="session")
def serve(models: dict[str, Path], tmp_path_factory: Any) -> Any:
    """What the servers answer with a feature, or without any (no title)."""

    @cache
    def serve(title: str = "", model: str = "plain") -> dict[str, Any]:
        output = tmp_path_factory.mktemp("feature") / "found.pt"
        command = [sys.executable, str(CASES), str(models[model]), str(output), title]
        done = subprocess.run(
            command,
            env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": bound(title)},
            cwd=output.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return torch.load(output)

    return serve


def certain(answer: dict[str, Any], by: dict[str, Any]) -> dict[str, Any]:
    """An answer up to the first token that was nearly another one."""
    best = by["logprobs"].topk(2).values
    ties = (best[:, 0] - best[:, 1] < 0.05).nonzero()
    end = int(ties[0]) if len(ties) else len(best)
    cut = {"tokens": answer["tokens"][:end], "logprobs": answer["logprobs"][: end + 1]}
    return {**answer, **cut}


def bound(title: str) -> str:
    """Which cores vLLM's workers run on, where there are two of them."""
    if not any(f.title == title and f.how == "workers" for f in FEATURES):
        return "auto"
    cores = sorted(os.sched_getaffinity(0))
    return f"{cores[0]}|{cores[-1]}"


def _servers(feature: Feature, method: str) -> list[str]:
    """Those that offer the method and start with the feature."""
    return [
        name
        for name, settings in SERVERS.items()
        if name not in feature.cannot
        and method in {settings["method"], *settings["request_methods"]}
    ]


def _check_kept(
    found: list[dict[str, Any]], alone: dict[str, Any], own: set[str], workers: int
) -> None:
    """Each worker keeps what one alone does of the same KV heads."""
    whole = {name: records for name, records in alone.items() if name in own}
    assert whole
    assert len(found) == workers
    for rank, records in enumerate(found):
        mine = {name: records[name] for name in own & records.keys()}
        assert mine == kept.part(whole, rank, workers)


@pytest.mark.parametrize(
    ("feature", "method"), RUN, ids=[f"{f.title}-{method}" for f, method in RUN]
)
def test_cell(feature: Feature, method: str, serve: Any) -> None:
    checked = 0
    for name in _servers(feature, method):
        found = serve(feature.title)[name]
        assert found["seen"]
        assert found["compressions"] == found["expected"]
        methods = [request.method for request in requests(SERVERS[name])]
        if "pairs" in found:
            for mine, theirs in found["pairs"]:
                assert mine == pytest.approx(theirs, abs=2e-4)
                checked += 1
            continue
        alone = serve(model="merged" if feature.how == "lora" else "plain")[name]
        if workers := feature.engine.get("tensor_parallel_size", 0):
            own = {str(n) for n, each in enumerate(methods) if each == method}
            _check_kept(found["kept"], alone["kept"][0], own, workers)
        pairs = zip(found["answers"], alone["answers"], methods, strict=True)
        for mine, theirs, own in pairs:
            if own == method:
                if feature.how == "lora":
                    mine, theirs = certain(mine, theirs), certain(theirs, theirs)
                assert Answer(**mine).near(Answer(**theirs))
                checked += 1
    assert checked
