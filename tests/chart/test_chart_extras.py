"""What the chart brings besides the operator: who may read, what the network lets through, and its README."""

from pathlib import Path

import pytest
import yaml
from chart_release import CHART, Helm, Object, named
from chart_values import leaves, markdown, values

from weightsync_contract import names
from weightsync_operator.cli.core.doctor.network import Peer, blocking

VALUES = Path(__file__).parent / "values"


def peer(namespace: str, **labels: str) -> Peer:
    return Peer(namespace, {"kubernetes.io/metadata.name": namespace}, labels, "10.9.9.9")


def policies(helm: Helm, *files: Path, **more: object) -> list[Object]:
    return [each for each in helm.template(*files, **more) if each["kind"] == "NetworkPolicy"]


def operator_of(helm: Helm) -> Peer:
    template = named(helm.template(), "Deployment")["spec"]["template"]
    return Peer(
        "weightsync-system",
        {"kubernetes.io/metadata.name": "weightsync-system"},
        template["metadata"]["labels"],
        "10.0.0.1",
    )


def test_the_readme_has_the_table_of_the_values() -> None:
    table = markdown((CHART / "values.yaml").read_text())
    assert table in (CHART / "README.md").read_text(), "put it there: python tests/support/chart_values.py"


def test_every_value_is_in_the_table_once_and_explained_or_plain() -> None:
    source = (CHART / "values.yaml").read_text()
    rows = {each.path: each for each in values(source)}
    read = leaves(yaml.safe_load(source))
    for path in read:
        # A map in one line is one row.
        assert any(path == row or path.startswith(f"{row}.") for row in rows), path
    plain = {"image.repository", "image.pullPolicy", "serviceAccount.create", "serviceAccount.annotations"}
    unexplained = {path for path, row in rows.items() if not row.text}
    assert unexplained - plain <= {
        *("podDisruptionBudget.enabled", "resources.requests", "resources.limits", "podLabels"),
        *("podAnnotations", "priorityClassName", "nodeSelector", "tolerations", "affinity"),
        *("metrics.serviceMonitor.interval", "agent.image.tag", "agent.image.digest"),
        *("agent.image.pullPolicy", "agent.logFormat", "agent.volumes", "agent.volumeMounts"),
    }


def test_every_value_that_is_nested_is_in_the_schema_too() -> None:
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())

    def fits(document: object, part: Object, path: str) -> None:
        part = schema["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
        if isinstance(document, dict) and part.get("additionalProperties") is False:
            for key, value in document.items():
                assert key in part["properties"], f"{path}.{key}"
                fits(value, part["properties"][key], f"{path}.{key}")

    fits(yaml.safe_load((CHART / "values.yaml").read_text()), schema, "")


def test_no_policy_unless_it_is_wanted(helm: Helm) -> None:
    assert policies(helm) == []


def test_the_operator_is_closed_but_for_what_it_needs(helm: Helm) -> None:
    (policy,) = policies(helm, VALUES / "monitored.yaml")
    own, agent = operator_of(helm), peer("team", app="vllm")
    monitoring = peer("monitoring", app="prometheus")

    def shut(direction: str, other: Peer, port: int, protocol: str = "TCP") -> bool:
        return bool(blocking([policy], own, direction, other, port, protocol))

    assert not shut("Ingress", agent, names.SESSION_PORT)
    assert not shut("Ingress", monitoring, names.METRICS_PORT)
    assert shut("Ingress", agent, names.METRICS_PORT)
    assert shut("Ingress", monitoring, names.HEALTH_PORT)
    api = peer("kube-system")
    assert not shut("Egress", api, 53, "UDP")
    assert not shut("Egress", api, 6443)
    assert not shut("Egress", api, 443)
    assert shut("Egress", agent, 8000)
    # Not of anybody else's pods.
    assert not blocking([policy], peer("weightsync-system", app="other"), "Ingress", agent, 1)


def test_what_is_named_is_opened_and_nothing_else(helm: Helm) -> None:
    policy = next(
        each for each in policies(helm, VALUES / "everything.yaml") if each["metadata"]["name"] == "sync"
    )
    ingress = {rule["ports"][0]["port"]: rule["from"] for rule in policy["spec"]["ingress"]}
    assert set(ingress) == {names.SESSION_PORT, names.METRICS_PORT}
    assert {"ipBlock": {"cidr": "10.0.0.0/8"}} in ingress[names.SESSION_PORT]
    egress = [port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]]
    assert egress == [53, 53, 16443, 9090]


def test_a_fleet_is_closed_to_strangers_but_for_its_requests(helm: Helm) -> None:
    fleet = [
        each for each in policies(helm, VALUES / "everything.yaml") if each["metadata"]["namespace"] == "team"
    ]
    member = peer("team", **{names.LABEL_ROLE: "inference"})
    trainer, stranger = peer("team", **{names.LABEL_ROLE: "trainer"}), peer("team", app="web")
    assert not blocking(fleet, member, "Ingress", trainer, None)
    assert blocking(fleet, member, "Ingress", stranger, None)
    assert blocking(fleet, member, "Ingress", peer("other", **{names.LABEL_ROLE: "trainer"}), None)
    assert not blocking(fleet, member, "Ingress", stranger, 8000)
    # Neither its way out nor anybody else's ports.
    assert not blocking(fleet, member, "Egress", stranger, 443)
    assert not blocking(fleet, stranger, "Ingress", peer("other"), 1)


@pytest.mark.parametrize(("role", "to"), [("view", {"view", "edit", "admin"}), ("edit", {"edit", "admin"})])
def test_who_has_the_clusters_roles_may_use_weightsyncs(helm: Helm, role: str, to: set[str]) -> None:
    made = named(helm.template(), "ClusterRole", f"weightsync-operator-{role}")
    prefix = "rbac.authorization.k8s.io/aggregate-to-"
    assert {
        label.removeprefix(prefix) for label in made["metadata"]["labels"] if label.startswith(prefix)
    } == to
    (rule,) = made["rules"]
    assert rule["resources"] == ["weightsyncs"]
    # The status is the operator's alone.
    assert ("update" in rule["verbs"]) == (role == "edit")


def test_readers_get_what_the_command_line_asks_for_and_no_more(helm: Helm) -> None:
    assert not [each for each in helm.template() if each["metadata"]["name"].endswith("-readers")]
    objects = helm.template(VALUES / "everything.yaml")
    role = named(objects, "Role", "sync-readers")
    assert role["rules"][0] == {
        "apiGroups": [""],
        "resources": ["services/proxy"],
        "resourceNames": [f"https:sync:{names.SESSION_PORT}"],
        "verbs": ["get"],
    }
    assert {verb for rule in role["rules"] for verb in rule["verbs"]} == {"get", "list"}
    subjects = named(objects, "RoleBinding", "sync-readers")["subjects"]
    assert [(each["kind"], each["name"], each.get("namespace")) for each in subjects] == [
        ("Group", "team:a", None),
        ("ServiceAccount", "ci", "ci"),
    ]
