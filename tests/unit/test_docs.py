"""The documentation says what the code does, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.methods import load_method, method_names

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("scripts/results/*.md")]
)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Names that GitHub gives the headings of a page."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", head.lower()) for head in heads)
    return {head.strip().replace(" ", "-") for head in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file) if file else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def shown(value: object) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("name", method_names())
def test_page_lists_the_parameters(name: str) -> None:
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
    table = page.partition("## Parameters")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `.*$", table, re.MULTILINE)
    assert rows == [
        f"| `{field}` | {shown(info.default)} | {info.description} |"
        for field, info in load_method(name).model_fields.items()
    ]
    assert f"(docs/methods/{name}.md)" in (ROOT / "README.md").read_text()


def test_settings_are_explained() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    keys = {"method", *KVCompressionConfig.model_fields} - {"scorer"}
    assert [key for key in sorted(keys) if f"`{key}`" not in page] == []


def test_metrics_are_explained() -> None:
    page = (ROOT / "docs" / "live.md").read_text()
    source = (ROOT / "vllm_kvcompress" / "engine" / "metrics.py").read_text()
    assert "kv_compression" in source
    names = re.findall(r"`(?:vllm:kv_compression_|\.\.\._)(\w+)", page)
    counters = {name.removesuffix("_total") for name in names} - {"config_info"}
    from vllm_kvcompress.plan import Counters

    fields = set(Counters.__dataclass_fields__)
    assert fields <= counters | {"skipped"}, fields - counters
