"""What NVIDIA's kvpress keeps. Runs in an environment that holds kvpress, not ours.

    python scores.py INPUT.npz OUTPUT.npz

INPUT holds ``queries`` ``[tokens, query_heads, head_size]`` and ``keys``
``[kv_heads, tokens, head_size]``, both rotated, and ``presses``: JSON, a list of
``[class name, arguments, layer, layers]``; an argument ``press`` is itself a class name
with arguments. OUTPUT holds for each of them, under its number, the kept positions
``[kv_heads, kept]`` in ascending order, those that a press only masks as -1.

A press computes queries out of hidden states and rotates them. Here hidden states are
the queries, and projection and rotation the identity. Values are positions, so that the
press's own cut shows what it kept.
"""

import json
import sys
from types import SimpleNamespace

import kvpress
import numpy as np
import torch


def main() -> None:
    """Read, press, write."""
    source, target = sys.argv[1:]
    given = np.load(source)
    queries = torch.from_numpy(given["queries"])
    keys = torch.from_numpy(given["keys"])[None]
    tokens, query_heads, head_size = queries.shape
    positions = torch.arange(tokens, dtype=torch.float32)
    values = positions[None, None, :, None].expand_as(keys)
    cos = torch.ones(1, tokens, head_size)
    kept = {}
    for number, (name, arguments, layer, layers) in enumerate(
        json.loads(str(given["presses"]))
    ):
        module = SimpleNamespace(
            q_proj=torch.nn.Identity(),
            head_dim=head_size,
            layer_idx=layer,
            config=SimpleNamespace(
                num_attention_heads=query_heads,
                num_key_value_heads=keys.shape[1],
                num_hidden_layers=layers,
                _attn_implementation="sdpa",
            ),
            masked_key_indices=None,
        )
        if "press" in arguments:
            inner, inner_arguments = arguments["press"]
            arguments["press"] = getattr(kvpress, inner)(**inner_arguments)
        press = getattr(kvpress, name)(**arguments)
        _, left = press.compress(
            module,
            queries.flatten(1)[None],
            keys,
            values,
            None,
            {"position_embeddings": (cos, torch.zeros_like(cos))},
        )
        left = left[0, :, :, 0].long()
        if module.masked_key_indices is not None:
            _, heads, masked = module.masked_key_indices
            left[heads, masked] = -1
        kept[str(number)] = left.sort(-1).values.numpy()
    np.savez(target, **kept)


if __name__ == "__main__":
    main()
