"""The dashboard asks for what /metrics has, and has the shape that Grafana imports."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from resnet_ensemble.server.metrics import Metrics

SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
OF_PROMETHEUS = {"instance", "job", "le"}
_SELECTOR = re.compile(r"(resnet_\w+)\{([^}]*)\}")
_BY = re.compile(r"by \(([^)]*)\)")
_LEGEND = re.compile(r"\{\{(\w+)\}\}")


@pytest.fixture(scope="module")
def dashboard(root: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((root / "deploy" / "grafana.json").read_text())
    return content


@pytest.fixture(scope="module")
def exposed() -> dict[str, set[str]]:
    """The labels of each sample's name in /metrics, whether it has a value yet or not."""
    registry = Metrics().registry
    labels = {name: set(metric._labelnames) for metric, names in registry._collector_to_names.items() for name in names}
    return {
        family.name + suffix: labels[family.name] for family in registry.collect() for suffix in SUFFIXES[family.type]
    }


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def targets(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in panels(dashboard):
        yield from panel["targets"]


def test_every_metric_that_is_asked_for_is_in_the_metrics(
    dashboard: dict[str, Any], exposed: dict[str, set[str]]
) -> None:
    asked = {name for target in targets(dashboard) for name in re.findall(r"resnet_\w+", target["expr"])}

    assert asked - exposed.keys() == set()


def test_every_metric_is_on_the_dashboard(dashboard: dict[str, Any], exposed: dict[str, set[str]]) -> None:
    text = " ".join(target["expr"] for target in targets(dashboard))
    families = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in exposed}

    assert {family for family in families if family not in text} == set()


def test_every_label_that_is_asked_for_belongs_to_its_metric(
    dashboard: dict[str, Any], exposed: dict[str, set[str]]
) -> None:
    for target in targets(dashboard):
        known = set(OF_PROMETHEUS)
        for name, matchers in _SELECTOR.findall(target["expr"]):
            known |= exposed[name]
            assert set(re.findall(r"(\w+)[!=]", matchers)) <= exposed[name] | OF_PROMETHEUS, target["expr"]
        grouped = {label.strip() for group in _BY.findall(target["expr"]) for label in group.split(",")}
        assert grouped <= known, target["expr"]
        assert set(_LEGEND.findall(target["legendFormat"])) <= (grouped or known), target["legendFormat"]


def test_every_query_looks_at_the_chosen_servers(dashboard: dict[str, Any]) -> None:
    for target in targets(dashboard):
        names, selected = re.findall(r"resnet_\w+", target["expr"]), _SELECTOR.findall(target["expr"])
        assert len(names) == len(selected) >= 1
        assert all('instance=~"$instance"' in matchers for _, matchers in selected)
        assert target["expr"].count("(") == target["expr"].count(")")


def test_it_has_the_shape_that_grafana_imports(dashboard: dict[str, Any]) -> None:
    assert isinstance(dashboard["title"], str)
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", dashboard["uid"])
    assert isinstance(dashboard["schemaVersion"], int)
    assert "id" not in dashboard  # Grafana gives one of its own
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables.keys() == {"datasource", "instance"}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    for panel in panels(dashboard):
        assert panel["type"] in ("timeseries", "stat", "table")
        assert panel["title"]
        assert panel["description"]
        assert panel["targets"]
        assert panel["fieldConfig"].keys() == {"defaults", "overrides"}
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)


def test_no_two_panels_overlap(dashboard: dict[str, Any]) -> None:
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells
