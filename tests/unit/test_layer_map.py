"""Which layer reads which: the maps of CLA, and the strings of LCKV's authors."""

import pytest

from vllm_kvcompress.models import layer_map
from vllm_kvcompress.models.configs import (
    ClaLlamaConfig,
    LCKVLlamaConfig,
    OptLlamaConfig,
)
from vllm_kvcompress.models.layer_map import LayerMap, Span


def parse(string, **options):
    return LayerMap.parse(string.split("_"), **options)


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("layers", [1, 2, 3, 7, 12, 20])
def test_every_layer_reads_the_first_of_its_group(layers, factor):
    owners = layer_map.every(layers, factor)
    assert len(owners) == layers
    for layer, owner in enumerate(owners):
        assert owner == factor * (layer // factor)
    assert len(LayerMap.of(owners).writers) == -(-layers // factor)


@pytest.mark.parametrize(
    "name, count",
    [("every", 10), ("keep_ends", 11), ("dense_front", 11), ("dense_back", 11)],
)
def test_owners_of_the_paper(name, count):
    config = ClaLlamaConfig(num_hidden_layers=20, cla_map=name)
    assert len(config.layer_map.writers) == count
    assert len(config.layer_map.owners) == 20
    assert not any(config.layer_map.masked)


def test_the_other_maps_of_the_paper():
    assert layer_map.keep_ends(8, 2) == [0, 1, 1, 3, 3, 5, 5, 7]
    front = [*range(10), *[9] * 9, 19]
    assert layer_map.dense_front(20) == front
    assert layer_map.dense_back(20) == [0, 1, *[1] * 9, *range(11, 20)]


@pytest.mark.parametrize("name", layer_map.CLA_MAPS)
@pytest.mark.parametrize("layers", [4, 6, 9, 20])
def test_no_map_of_cla_reads_ahead(name, layers):
    owners = layer_map.CLA_MAPS[name](layers, 2)
    for layer, owner in enumerate(owners):
        assert owner <= layer
        assert owners[owner] == owner


@pytest.mark.parametrize(
    "string, owners, sliding, masked",
    [
        ("0_1_2", (0, 1, 2), (0, 0, 0), (0, 0, 0)),
        ("0_4_4_4_4_5", (0, 4, 4, 4, 4, 5), (0,) * 6, (0, 1, 1, 1, 0, 0)),
        ("5_5_5_5_5_5", (5,) * 6, (0,) * 6, (1, 1, 1, 1, 1, 0)),
        ("0s_1s_2_2", (0, 1, 2, 2), (1, 1, 0, 0), (0, 0, 0, 0)),
        ("0_10s_" + "_".join("2" * 9), (0, 10, *[2] * 9), None, None),
    ],
)
def test_grammar(string, owners, sliding, masked):
    found = parse(string)
    assert found.owners == owners
    if sliding is not None:
        assert found.sliding == tuple(map(bool, sliding))
        assert found.masked == tuple(map(bool, masked))


def test_old_dialect_masks_all_layers():
    assert parse("0_4_4_4_4_5", never_itself=True).masked == (True,) * 6
    config = LCKVLlamaConfig(
        num_hidden_layers=3, layer_types="0_2_2", force_nodiag=True
    )
    assert config.layer_map.masked == (True,) * 3


def test_writers_readers_and_windows():
    found = parse("0_1s_1s_3_1s_3s")
    assert found.writers == (0, 1, 3)
    assert found.readers(1) == (1, 2, 4)
    assert found.readers(3) == (3, 5)
    assert [found.keeps_window(writer) for writer in found.writers] == [0, 1, 0]


@pytest.mark.parametrize(
    "string, spans",
    [
        ("0_1_2_3", [Span(0, 4)]),
        ("0_0_2_2", [Span(0, 4)]),
        ("0_4_4_4_4_5", [Span(0, 1), Span(1, 5, True), Span(5, 6)]),
        ("5_5_5_5_5_5", [Span(0, 6, True)]),
        ("0_3_3_3_7_7_7_7", [Span(0, 1), Span(1, 4, True), Span(4, 8, True)]),
        # The second cycle begins inside the first: they must converge together.
        ("0_3_5_3_4_5_6", [Span(0, 1), Span(1, 6, True), Span(6, 7)]),
        ("2_1_4_3_6_5_6_7", [Span(0, 7, True), Span(7, 8)]),
        ("1_1_2_4_4", [Span(0, 2, True), Span(2, 3), Span(3, 5, True)]),
    ],
)
def test_spans(string, spans):
    assert list(parse(string).spans) == spans


@pytest.mark.parametrize("string", ["0_1_3_3", "2_0_1_2_2", "0_6_2_6_4_5_6"])
def test_spans_hold_all_layers_and_whole_cycles(string):
    found = parse(string)
    covered = [i for span in found.spans for i in range(span.first, span.end)]
    assert covered == list(range(len(found.owners)))
    for layer, owner in enumerate(found.owners):
        span = next(s for s in found.spans if s.first <= layer < s.end)
        assert owner < span.end
        assert owner <= layer or span.repeats


@pytest.mark.parametrize("string", ["", "a", "0_-1", "0_1S", "0_ss", "0_1.0", "0__1"])
def test_other_grammars_are_refused(string):
    with pytest.raises(ValueError, match="layer numbers"):
        parse(string)


@pytest.mark.parametrize("string", ["0_2", "0_1_3", "1"])
def test_layers_that_are_not_there_are_refused(string):
    with pytest.raises(ValueError, match="reads layer"):
        parse(string)


def test_roles():
    assert layer_map.of_roles([0, 1, 1, 2, 0], -2) == [0, 3, 3, 3, 4]
    assert layer_map.of_roles([0, 1, 1, 0], 2) == [0, 2, 2, 3]
    assert layer_map.of_cla_roles([2, 1, 2, 1, 0]) == [0, 0, 2, 2, 4]
    assert layer_map.of_cla_roles([0, 1, 1, 2]) == [0, 0, 0, 3]


@pytest.mark.parametrize(
    "read, match",
    [
        (lambda: layer_map.of_roles([0, 3], -1), "roles 0, 1 and 2"),
        (lambda: layer_map.of_roles([0, 2, 0], -1), "elsewhere"),
        (lambda: layer_map.of_roles([2, 2], -1), "elsewhere"),
        (lambda: layer_map.of_roles([0, 1], 5), "reads layer|target"),
        (lambda: layer_map.of_cla_roles([0, 3]), "roles 0, 1 and 2"),
        (lambda: layer_map.of_cla_roles([1, 0]), "begins with 1"),
    ],
)
def test_other_roles_are_refused(read, match):
    with pytest.raises(ValueError, match=match):
        LayerMap.of(read())


def test_first_code_base_of_lckv():
    config = OptLlamaConfig(
        num_hidden_layers=6, layer_types="0_1_1_1_2_0", target_layer=-2
    )
    assert config.layer_map.owners == parse("0_4_4_4_4_5").owners
    assert all(config.layer_map.masked)
    old = OptLlamaConfig(num_hidden_layers=5, num_warmup_layers=2)
    assert old.layer_map.owners == (0, 1, 4, 4, 4)
    assert config.passes == 9


@pytest.mark.parametrize(
    "config, settings, match",
    [
        (LCKVLlamaConfig, {"layer_types": "0_1"}, "2 entries"),
        (LCKVLlamaConfig, {"layer_types": "0_1_x"}, "layer numbers"),
        (LCKVLlamaConfig, {"layer_types": "0_1_3"}, "reads layer 3"),
        (ClaLlamaConfig, {"layer_types": "2_1_x"}, "has numbers"),
        (ClaLlamaConfig, {"cla_share_factor": 0}, "at least 1"),
        (ClaLlamaConfig, {"cla_map": "lasagna"}, "none of"),
        (OptLlamaConfig, {"layer_types": "0_2_1"}, "elsewhere"),
    ],
)
def test_configurations_check_their_map(config, settings, match):
    with pytest.raises(Exception, match=match):
        config(num_hidden_layers=3, **settings)


def test_layer_types_are_written_as_their_authors_do(tmp_path):
    config = LCKVLlamaConfig(num_hidden_layers=3, layer_types="0_2s_2")
    config.save_pretrained(tmp_path)
    assert '"layer_types": "0_2s_2"' in (tmp_path / "config.json").read_text()
    assert LCKVLlamaConfig.from_pretrained(tmp_path).layer_map == config.layer_map
