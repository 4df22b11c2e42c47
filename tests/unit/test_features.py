"""The table of `tests.features` is what docs/matrix.md shows, and refusals are real."""

import ast
from pathlib import Path

import pytest

from tests.features import FEATURES, NAMES, Feature, page
from tests.matrix import METHODS
from tests.unit.test_refusals import _config, model
from vllm_kvcompress.config import ConfigError

__all__ = ["model"]  # a fixture

ROOT = Path(__file__).parents[2]
ENTRIES = {entry["method"]: entry for entry in reversed(METHODS)}
REFUSED = [
    (feature, method)
    for feature in FEATURES
    for method in NAMES
    if feature.status(method) == "refused" and feature.engine
]


def test_page_is_the_table() -> None:
    assert (ROOT / "docs" / "matrix.md").read_text() == page()


@pytest.mark.parametrize(
    ("feature", "method"), REFUSED, ids=[f"{f.title}-{method}" for f, method in REFUSED]
)
def test_cell_is_refused(feature: Feature, method: str, model: Path) -> None:
    words = feature.refusal(method)
    assert words
    with pytest.raises(ConfigError, match=words):
        _config(model, ENTRIES[method], **feature.engine)


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.title)
def test_cells_have_proofs(feature: Feature) -> None:
    """Where it is elsewhere, there is such a test."""
    for node in feature.elsewhere.values():
        file, _, name = node.partition("::")
        tree = ast.parse((ROOT / file).read_text())
        tests = {item.name for item in tree.body if isinstance(item, ast.FunctionDef)}
        assert name in tests
