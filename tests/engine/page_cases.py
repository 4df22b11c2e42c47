"""Cases for `test_page_formats`, run as a script: results are JSON in a file.

Two layers' pages, filled by vLLM's own writers, which run as in `v2_harness`.
"""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# On the path for one import only: folders of the root would shadow packages.
sys.path[0] = str(Path(__file__).parents[2])
from tests.engine import v2_harness  # noqa: E402
from tests.quantised import FORMATS  # noqa: E402

del sys.path[0]

BLOCKS, HEADS, BLOCK, HEAD_SIZE = 8, 2, 16, 32
SCALES = {"shallow": (0.5, 0.02), "deep": (0.25, 0.03)}  # of 8-bit floats


def _layer(name: str, kv_cache_dtype: str, cache: Any) -> Any:
    """An attention layer with vLLM's implementation, on pages it shares with others."""
    import torch
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    impl = TritonAttentionImpl(
        HEADS, HEAD_SIZE, 1.0, HEADS, None, None, kv_cache_dtype=kv_cache_dtype
    )
    return SimpleNamespace(
        kv_cache_dtype=kv_cache_dtype,
        kv_cache=cache,
        impl=impl,
        layer_name=name,
        _k_scale=torch.tensor(SCALES[name][0]),
        _v_scale=torch.tensor(SCALES[name][1]),
        _k_scale_float=SCALES[name][0],
        _v_scale_float=SCALES[name][1],
    )


def _pair(kv_cache_dtype: str) -> list[Any]:
    import torch
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
    from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

    from vllm_kvcompress.engine import page_formats
    from vllm_kvcompress.engine.shared_pages import SharingRows

    # Of other formats vLLM has bytes.
    types = {"auto": torch.float32, "int8_per_token_head": torch.int8}
    spec = TritonAttentionBackend.customize_spec(
        FullAttentionSpec(
            block_size=BLOCK,
            num_kv_heads=HEADS,
            head_size=HEAD_SIZE,
            dtype=types.get(kv_cache_dtype, torch.uint8),
            kv_quant_mode=get_kv_quant_mode(kv_cache_dtype),
        )
    )
    row = spec.state_content_size_bytes // spec.dtype.itemsize
    cache = torch.zeros(BLOCKS, BLOCK, HEADS, row, dtype=spec.dtype).transpose(1, 2)
    pair = [_layer(name, kv_cache_dtype, cache) for name in ("shallow", "deep")]
    SharingRows(1, cache.device).bind([tuple(pair)], {})
    for layer in pair:
        page_formats.find_scales(layer)
    return pair


def _read(pages: Any, half: int, blocks: Any) -> Any:
    """What attention reads: ``[kv_heads, tokens, head_size]``."""
    from vllm_kvcompress.engine.page_formats import has_scales

    vectors = pages.decode(half, pages.take(half, blocks))
    if has_scales(pages.layer.kv_cache_dtype) or not hasattr(
        pages.layer, "page_scales"
    ):
        return vectors
    factors = pages.layer.page_scales[half][blocks].permute(2, 0, 1).flatten(1)
    return vectors * factors[..., None]


def case(kv_cache_dtype: str, *, alike: bool = False) -> dict[str, Any]:
    """Merge two layers' tokens: three blocks, of which one is retained if they differ.

    Args:
        kv_cache_dtype: vLLM's.
        alike: Both layers hold the same directions.

    Returns:
        ``moved``: both layers have retained the same tokens, bit for bit. ``errors``:
        how far what either layer reads is from what it should, as a share of the
        vector's largest element.
    """
    import torch

    from tests.oracle import minicache
    from vllm_kvcompress.engine.merging import Part, merge_layers
    from vllm_kvcompress.engine.page_formats import pages_of
    from vllm_kvcompress.methods.minicache import MiniCache

    generator = torch.Generator().manual_seed(0)
    pair, tokens = _pair(kv_cache_dtype), 3 * BLOCK
    sources = torch.tensor([[1, 2, 3], [4, 5, 6]])
    merged = 3 if alike else 2
    targets = torch.tensor([[1, 2, 3], [1, 2, 3 if alike else 7]])
    shape = (2, tokens, HEADS, HEAD_SIZE)
    first, other = (torch.randn(shape, generator=generator) for _ in range(2))
    for layer, source, new in zip(
        pair, sources, (first, first * 3 if alike else first + other), strict=True
    ):
        slots = (source[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
        layer.impl.do_kv_cache_update(layer, *new, layer.kv_cache, slots)
    both = [pages_of(layer) for layer in pair]
    rows, held = (
        [
            [read(own, half, source) for half in (0, 1)]
            for own, source in zip(both, sources, strict=True)
        ]
        for read in (lambda own, *where: own.take(*where), _read)
    )
    parts = [Part(*part) for part in zip(pair, sources, targets, strict=True)]
    merge_layers(MiniCache(t=0.4), *parts, tokens, tokens, merged_blocks=merged)
    left = [
        [own.take(half, target) for half in (0, 1)]
        for own, target in zip(both, targets, strict=True)
    ]
    seen = [
        [_read(own, half, target) for half in (0, 1)]
        for own, target in zip(both, targets, strict=True)
    ]
    moved, errors = True, [0.0, 0.0]
    for head in range(HEADS):
        layers = [[half[head] for half in layer] for layer in held]
        stayed, wanted = set(), layers
        if not alike:
            wanted, stayed = minicache(*layers, t=0.4, retained=BLOCK)
        order = [i for i in range(tokens) if i not in stayed]
        for number, half in itertools.product((0, 1), (0, 1)):
            exact = rows[number][half][head][sorted(stayed)]
            moved &= torch.equal(left[number][half][head][merged * BLOCK :], exact)
            vectors = wanted[number][half][order]
            off = seen[number][half][head][: merged * BLOCK] - vectors
            share = off.abs().amax(-1) / vectors.abs().amax(-1)
            errors[number] = max(errors[number], float(share.max()))
    return {"moved": moved, "errors": errors}


def kept(kv_cache_dtype: str) -> dict[str, Any]:
    """Move kept tokens into other pages, and read vectors where they lie.

    Returns:
        ``moved``: rows are the same, bit for bit, scales among them. ``read``: so are
        the vectors that methods are given, but for scales.
    """
    import torch

    from vllm_kvcompress.engine.page_formats import pages_of

    generator = torch.Generator().manual_seed(0)
    layer = _pair(kv_cache_dtype)[0]
    pages, source, target = pages_of(layer), torch.tensor([4, 1, 6]), torch.tensor([2])
    new = torch.randn(2, 3 * BLOCK, HEADS, HEAD_SIZE, generator=generator)
    slots = (source[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
    layer.impl.do_kv_cache_update(layer, *new, layer.kv_cache, slots)
    drawn = torch.rand(HEADS, 3 * BLOCK, generator=generator)
    best = drawn.topk(BLOCK).indices.sort()[0]
    rows = [pages.take(half, source) for half in (0, 1)]
    read = [pages.vectors(half, source.expand(HEADS, -1), 40) for half in (0, 1)]
    alike = all(
        torch.equal(own.dense(), pages.decode(half, rows[half])[:, :40])
        for half, own in enumerate(read)
    )
    pages.compact(source, best, target)
    head = torch.arange(HEADS)[:, None]
    moved = all(
        torch.equal(pages.take(half, target), rows[half][head, best]) for half in (0, 1)
    )
    return {"moved": moved, "read": alike}


def main(output: str) -> None:
    """Run all cases."""
    v2_harness.boot(v2=True)
    results = {
        name: {
            "apart": case(name),
            "alike": case(name, alike=True),
            "kept": kept(name),
        }
        for name in FORMATS
    }
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
