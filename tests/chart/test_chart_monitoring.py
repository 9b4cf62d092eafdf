"""ServiceMonitor, alerts and dashboard ask for metrics, reasons and runbooks that exist."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart_release import CHART, ROOT, Helm, Object, named

from weightsync_contract import names
from weightsync_contract.messages import ServingState
from weightsync_contract.reasons import Condition, Reason
from weightsync_operator.cli.core.outlook import FAILURES
from weightsync_operator.metrics import table

MONITORED = Path(__file__).parent / "values/monitored.yaml"
EVERYTHING = Path(__file__).parent / "values/everything.yaml"
ALERTS: list[dict[str, str]] = yaml.safe_load((CHART / "alerts.yaml").read_text())
DASHBOARD: dict[str, Any] = json.loads((CHART / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [each["expr"] for each in ALERTS] + [
    target["expr"] for panel in PANELS for target in panel["targets"]
]
SUFFIXES = ("_bucket", "_sum", "_count")


def known() -> dict[str, table.Metric]:
    found = {each.name: each for each in table.METRICS}
    for each in table.METRICS:
        if each.kind is table.Kind.HISTOGRAM:
            found |= {f"{each.name}{suffix}": each for suffix in SUFFIXES}
    return found


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_is_about_metrics_and_labels_that_exist(expression: str) -> None:
    metrics = known()
    named_ = re.findall(r"(weightsync_\w+)(?:\{([^}]*)\})?", expression)
    assert named_
    labels: set[str] = {"le", "pod"}
    for name, matchers in named_:
        assert name in metrics, name
        labels |= set(metrics[name].labels)
        for label in re.findall(r"(\w+)(?:=~|!~|!=|=)", matchers):
            assert label in metrics[name].labels, f"{name} has no label {label}"
    for group in re.findall(r"\bby \(([^)]*)\)", expression):
        assert {label.strip() for label in group.split(",")} <= labels
    for left, right in ("()", "{}", "[]"):
        assert expression.count(left) == expression.count(right)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_names_values_that_exist(expression: str) -> None:
    allowed = {
        "condition": set(Condition),
        "status": {"True", "False", "Unknown"},
        "reason": {*Reason, *FAILURES},
        "state": {*ServingState, "NotConnected"},
        "result": {"ok", "error"},
    }
    for label, text in re.findall(r'(\w+)(?:=~|!~|!=|=)"([^"$]+)"', expression):
        assert set(text.split("|")) <= {str(each) for each in allowed[label]}, text


def test_a_rollout_that_failed_is_what_the_command_line_calls_so() -> None:
    (alert,) = (each for each in ALERTS if each["alert"] == "WeightSyncRolloutFailed")
    (reasons,) = re.findall(r'reason=~"([^"]+)"', alert["expr"])
    # But nobody is woken for what somebody asked for.
    assert set(reasons.split("|")) == {str(each) for each in FAILURES - {Reason.ABORTED}}


def test_each_alert_has_its_runbook_and_each_runbook_its_alert() -> None:
    page = (ROOT / "docs/runbooks.md").read_text()
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == [each["alert"] for each in ALERTS]


def test_every_reason_of_a_failed_rollout_is_in_the_runbook() -> None:
    section = (ROOT / "docs/runbooks.md").read_text().split("## WeightSyncRolloutFailed")[1].split("\n## ")[0]
    told = {
        word
        for row in re.findall(r"^\| ([A-Z][\w, ]+) \|", section, re.MULTILINE)
        for word in row.split(", ")
    }
    assert told == {str(each) for each in FAILURES}


def test_nothing_of_it_unless_it_is_wanted(helm: Helm) -> None:
    kinds = {each["kind"] for each in helm.template()}
    assert not kinds & {"ServiceMonitor", "PrometheusRule", "ConfigMap"}


def test_the_alerts_are_made_into_a_rule(helm: Helm) -> None:
    rule = named(helm.template(MONITORED), "PrometheusRule")
    (group,) = rule["spec"]["groups"]
    assert [each["alert"] for each in group["rules"]] == [each["alert"] for each in ALERTS]
    for made, source in zip(group["rules"], ALERTS, strict=True):
        assert (made["expr"], made["for"]) == (source["expr"], source["for"])
        assert made["labels"]["severity"] in ("critical", "warning")
        assert made["annotations"]["summary"] == source["summary"]
        assert made["annotations"]["runbook_url"] == f"docs/runbooks.md#{source['alert'].lower()}"
    other = named(helm.template(EVERYTHING), "PrometheusRule")
    first = other["spec"]["groups"][0]["rules"][0]
    assert first["annotations"]["runbook_url"] == "https://runbooks.example/weightsync#weightsyncnoleader"
    assert other["metadata"]["labels"]["release"] == "prometheus"


def test_the_monitor_finds_the_service_and_its_port(helm: Helm) -> None:
    objects = helm.template(MONITORED)
    spec = named(objects, "ServiceMonitor")["spec"]
    service = named(objects, "Service")
    assert spec["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert spec["namespaceSelector"]["matchNames"] == [service["metadata"]["namespace"]]
    (endpoint,) = spec["endpoints"]
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    assert ports[endpoint["port"]] == names.METRICS_PORT
    # Else a pod's series would have the operator's pod and namespace for labels.
    assert endpoint["honorLabels"] is True


def test_the_dashboard_is_the_file(helm: Helm) -> None:
    made: Object = named(helm.template(MONITORED), "ConfigMap", "weightsync-operator-dashboard")
    assert made["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(made["data"]["weightsync.json"]) == DASHBOARD


def test_every_panel_is_explained_has_a_place_of_its_own_and_asks_something() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["targets"]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    titles = {panel["title"] for panel in PANELS}
    assert {"Versions over pods over time", "Stalls", "Where the time goes", "Received"} <= titles
