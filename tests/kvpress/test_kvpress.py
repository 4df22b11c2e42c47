"""The same tokens as NVIDIA's kvpress, on random keys and queries.

`make test-kvpress` installs kvpress (0.5.5) into an environment of its own and runs
this; otherwise KVCOMPRESS_KVPRESS_PYTHON names the Python of such an environment.

Where we differ on purpose, and how the comparison deals with it:

| | kvpress | here | compared |
|---|---|---|---|
| size | `compression_ratio`, the share that goes | `budget`, tokens that stay | equal counts |
| SnapKV's window, TOVA's last token | the highest score plus 1 | `+inf` | the same tokens |
| SnapKV's pooling | average, per query head, then mean of the group | mean, then pooling; `max` by default | `avg`: they commute |
| SnapKV's defaults | window 64, kernel 5 | window 32, kernel 7 | equal settings |
| PyramidKV's budgets | hold the window; real numbers, rounded | beside the window; whole numbers, cut off | kvpress plus window, within 2 |
| PyramidKV, no pyramid | where a layer would get less than a window | where the prompt is shorter than two means | neither |
| StreamingLLM | scores 1 or 0 | position as score | the same tokens |
| KeyDiff, K-norm | in the model's dtype | in float32 | in float32 |
| attention | float32 softmax, then the model's dtype | float32 | in float32 |
| soft cap, scale | none, `head_size ** -0.5` | the model's | none, `head_size ** -0.5` |
| equal scores | whichever topk takes | the lowest position | none are equal |
| Ada-SnapKV's floor | each head's best `alpha_safeguard` of the even share | mixed: that part evenly, the rest by score, as the authors' code does | 0: the same |
| Ada-SnapKV's shares | tokens, masked | whole pages, freed | pages of one token |
| random | one generator for all layers | one per layer, seeded | not compared |
| R-KV | not in kvpress | | not compared |
"""  # noqa: E501

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vllm_kvcompress.methods.ada_snapkv import AdaSnapKV
from vllm_kvcompress.methods.base import Layer, Scorer
from vllm_kvcompress.methods.keydiff import KeyDiff
from vllm_kvcompress.methods.knorm import KNorm
from vllm_kvcompress.methods.pyramidkv import PyramidKV
from vllm_kvcompress.methods.snapkv import SnapKV
from vllm_kvcompress.methods.streamingllm import StreamingLLM
from vllm_kvcompress.methods.tova import TOVA
from vllm_kvcompress.ops.select import select, select_each

PYTHON = os.environ.get("KVCOMPRESS_KVPRESS_PYTHON")
SCRIPT = Path(__file__).with_name("scores.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON,
        reason="KVCOMPRESS_KVPRESS_PYTHON names no Python that has kvpress; "
        "make test-kvpress sets one up",
    ),
]

TOKENS, KV_HEADS, HEAD_SIZE = 200, 2, 16
RATIOS = [0.1, 0.5, 0.8]
PAIRS: list[tuple[Scorer, str, dict[str, Any]]] = [
    *(
        (
            SnapKV(window=window, kernel_size=kernel, pooling="avg"),
            "SnapKVPress",
            {"window_size": window, "kernel_size": kernel},
        )
        for window, kernel in [(32, 5), (8, 7), (1, 1)]
    ),
    (StreamingLLM(sinks=4), "StreamingLLMPress", {"n_sink": 4}),
    (StreamingLLM(sinks=0), "StreamingLLMPress", {"n_sink": 0}),
    (KNorm(), "KnormPress", {}),
    (KeyDiff(), "KeyDiffPress", {}),
    (TOVA(), "TOVAPress", {}),
]


def kvpress_keeps(
    folder: Path, queries: torch.Tensor, keys: torch.Tensor, presses: list[list[Any]]
) -> list[torch.Tensor]:
    """Positions that each press keeps, ``[kv_heads, kept]``; see scores.py."""
    source, target = folder / "input.npz", folder / "output.npz"
    np.savez(
        source,
        queries=queries.numpy(),
        keys=keys.numpy(),
        presses=np.array(json.dumps(presses)),
    )
    # -I: neither our packages nor this folder, which is called kvpress.
    command = [str(PYTHON), "-I", str(SCRIPT), str(source), str(target)]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    kept = np.load(target)
    return [torch.from_numpy(kept[str(number)]) for number in range(len(presses))]


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_same_tokens(group: int, seed: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(KV_HEADS, TOKENS, HEAD_SIZE, generator=generator)
    queries = torch.randn(TOKENS, group * KV_HEADS, HEAD_SIZE, generator=generator)
    cases = [
        (scorer, [name, {**arguments, "compression_ratio": ratio}, 0, 1])
        for scorer, name, arguments in PAIRS
        for ratio in RATIOS
    ]
    theirs = kvpress_keeps(tmp_path, queries, keys, [press for _, press in cases])
    layer = Layer(0, HEAD_SIZE**-0.5)
    for (scorer, press), kept in zip(cases, theirs, strict=True):
        window = scorer.needs_queries
        scores = scorer.score(queries[-window:] if window else None, keys, None, layer)
        assert torch.equal(select(scores, kept.shape[1]), kept), press


@pytest.mark.parametrize("ratio", RATIOS)
def test_same_tokens_of_uneven_heads(ratio: float, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(KV_HEADS, TOKENS, HEAD_SIZE, generator=generator)
    keys[0] *= 2  # looks at fewer tokens
    queries = torch.randn(TOKENS, 4 * KV_HEADS, HEAD_SIZE, generator=generator)
    inner = {"compression_ratio": ratio, "window_size": 8, "kernel_size": 5}
    press = {"press": ["SnapKVPress", inner], "alpha_safeguard": 0.0}
    (theirs,) = kvpress_keeps(tmp_path, queries, keys, [["AdaKVPress", press, 0, 1]])
    scorer = AdaSnapKV(window=8, kernel_size=5, pooling="avg", floor=0.0)
    scores = scorer.score(queries[-8:], keys, None, Layer(0, HEAD_SIZE**-0.5))
    kept = [row[row >= 0] for row in theirs]
    shares = scorer.head_shares([scores], sum(map(len, kept)), 1)
    assert shares == [len(row) for row in kept] and len(set(shares)) > 1
    for ours, row in zip(select_each(scores, shares), kept, strict=True):
        assert torch.equal(ours, row)


@pytest.mark.parametrize(
    ("tokens", "past", "layers", "window", "beta"),
    [(8000, 2000, 32, 32, 20), (1000, 333, 5, 8, 3), (1000, 500, 8, 64, 20)],
)
def test_pyramid_budgets(
    tokens: int, past: int, layers: int, window: int, beta: int, tmp_path: Path
) -> None:
    keys = torch.randn(1, tokens, 4)
    arguments = {
        "compression_ratio": 1 - past / tokens,
        "window_size": window,
        "beta": beta,
    }
    presses = [["PyramidKVPress", arguments, layer, layers] for layer in range(layers)]
    kept = kvpress_keeps(tmp_path, torch.randn(tokens, 1, 4), keys, presses)
    theirs = [positions.shape[1] + window for positions in kept]
    scorer = PyramidKV(window=window, beta=beta)
    ours = scorer.layer_budgets(tokens, past + window, layers)
    assert len(set(theirs)) > 1, "no pyramid to compare"
    assert all(abs(a - b) <= 2 for a, b in zip(ours, theirs, strict=True))
    assert sum(ours) <= (past + window) * layers
