"""The dashboard asks for what a real server serves."""

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

SHIPPED = files("vllm_kvcompress.configs") / "grafana" / "vllm-kvcompress.json"
DASHBOARD = json.loads(SHIPPED.read_text())
RECORD = Path(__file__).parent / "data" / "metrics-first.txt"
TARGETS = [target for panel in DASHBOARD["panels"] for target in panel["targets"]]
EXPRESSIONS = [target["expr"] for target in TARGETS]
VARIABLES = DASHBOARD["templating"]["list"]
SELECTOR = re.compile(r"(vllm:\w+)(?:{([^}]*)})?")


def labels_by_metric() -> dict[str, set[str]]:
    families = text_string_to_metric_families(RECORD.read_text())
    samples = [sample for family in families for sample in family.samples]
    return {sample.name: set(sample.labels) for sample in samples}


def outside_quotes(expression: str) -> str:
    return re.sub(r'"[^"]*"', '""', expression)


@pytest.mark.parametrize(
    "expression",
    [*EXPRESSIONS, *(v["definition"] for v in VARIABLES if v["type"] == "query")],
)
def test_metrics_and_labels_are_served(expression) -> None:
    served = labels_by_metric()
    selectors = SELECTOR.findall(expression)
    assert selectors
    for name, matchers in selectors:
        assert name in served, name
        assert set(re.findall(r"(\w+)=~", matchers)) <= served[name]
    for group in re.findall(r"by \(([^)]*)\)", expression):
        assert set(group.split(", ")) <= set.intersection(
            *(served[name] for name, _ in selectors)
        )


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_brackets_are_balanced(expression) -> None:
    opened = []
    pairs = {")": "(", "]": "[", "}": "{"}
    for character in outside_quotes(expression):
        if character in pairs.values():
            opened.append(character)
        elif character in pairs:
            assert opened and opened.pop() == pairs[character]
    assert not opened


def test_counters_are_asked_for_as_rates() -> None:
    for expression in EXPRESSIONS:
        for counter in re.finditer(r"vllm:\w+_(total|bucket)\b", expression):
            assert expression[: counter.start()].endswith("rate(")


def test_every_variable_is_declared() -> None:
    declared = {variable["name"] for variable in VARIABLES}
    used = set(re.findall(r"\$\{?([a-z]\w+)", json.dumps(DASHBOARD["panels"])))
    assert used == declared
    sources = {json.dumps(target["datasource"]) for target in TARGETS}
    assert sources == {json.dumps({"type": "prometheus", "uid": "${datasource}"})}


def test_panels() -> None:
    assert DASHBOARD["schemaVersion"] >= 38  # Grafana 10
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)  # none lies on another
    assert max(x for x, _ in cells) < 24
