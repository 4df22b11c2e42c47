"""Layers that share KV allocate it once: memory is what the layer map says."""

from typing import Any

import pytest

from tests.engine.conftest import (
    attention,
    block_bytes,
    blocks_held,
    engine,
    prompt,
    save_llama,
    scheduler,
)
from tests.engine.shared_models import make

pytestmark = pytest.mark.vllm
BLOCKS = 400
# Layers that store keys and values, of all.
SHARES = {
    "cla2": (3, 5),
    "cla3": (3, 7),
    "cla_ends": (4, 6),
    "lckv": (3, 6),
    "lckv_no_warmup": (1, 4),
    "lckv_middle": (3, 7),
    "lckv_targets": (4, 6),
}


def held(llm: Any, tokens: int) -> int:
    """Bytes of one block of every layer, times the blocks of a request."""
    return block_bytes(llm) * blocks_held(llm, prompt(tokens))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, int, int]:
    """Bytes per layer of a Llama of the same shape: in all, and of two requests."""
    layers = 2
    path = save_llama(tmp_path_factory.mktemp("plain"), layers=layers)
    with engine(path, num_gpu_blocks_override=BLOCKS) as llm:
        allocated = block_bytes(llm) * BLOCKS
        assert allocated == sum(layer.kv_cache.nbytes for layer in attention(llm))
        return tuple(
            found // layers for found in (allocated, held(llm, 100), held(llm, 300))
        )


@pytest.mark.parametrize("name", SHARES)
def test_memory_is_the_share_of_layers_that_write(
    name: str,
    plain: tuple[int, int, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    made = make(name, tmp_path_factory.mktemp(name))
    writers, layers = SHARES[name]
    layer_map = made.reference.config.layer_map
    assert (len(layer_map.writers), len(layer_map.owners)) == (writers, layers)
    with engine(made.path, num_gpu_blocks_override=BLOCKS) as llm:
        caches = [layer.kv_cache for layer in attention(llm)]
        assert len(caches) == layers
        places = [cache.data_ptr() for cache in caches]
        assert places == [places[owner] for owner in layer_map.owners]
        own = {cache.data_ptr(): cache.nbytes for cache in caches}
        found = sum(own.values()), held(llm, 100), held(llm, 300)
    assert len(own) == writers
    assert found == tuple(writers * each for each in plain)


@pytest.mark.parametrize("name", ["yoco", "yoco_retention"])
def test_yoco_caches_once(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One layer's pages grow with a request, whatever the depth of the model."""
    made = make(name, tmp_path_factory.mktemp(name))
    half = made.reference.config.n_layers // 2
    with engine(made.path, num_gpu_blocks_override=BLOCKS) as llm:
        groups = scheduler(llm).kv_cache_config.kv_cache_groups
        (full,) = [
            index
            for index, group in enumerate(groups)
            if type(group.kv_cache_spec).__name__ == "FullAttentionSpec"
        ]
        readers = attention(llm)[-half:]
        assert groups[full].layer_names == [readers[0].layer_name]
        assert sum(len(group.layer_names) for group in groups) == half + 1
        assert len({reader.kv_cache.data_ptr() for reader in readers}) == 1
        size = groups[full].kv_cache_spec.block_size
        taken = {n: counts(llm, n) for n in (100, 484, 996)}
    for tokens, count in taken.items():
        assert count[full] == -(-(tokens + 1) // size)
    rest = [sum(count) - count[full] for count in taken.values()]
    # A window's blocks, or a state's.
    assert len(set(rest)) == 1


def counts(llm: Any, tokens: int) -> list[int]:
    """Blocks of every group that a request holds one step after its prompt."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=8, ignore_eos=True, detokenize=False)
    given = {"prompt_token_ids": prompt(tokens)}
    name = llm.llm_engine.add_request("77", given, params)
    requests = scheduler(llm).requests
    while not (requests and requests[name].num_output_tokens > 1):
        llm.llm_engine.step()
    managers = scheduler(llm).kv_cache_manager.coordinator.single_type_managers
    found = [
        sum(not block.is_null for block in manager.req_to_blocks[name])
        for manager in managers
    ]
    llm.llm_engine.abort_request([name], internal=True)
    return found
