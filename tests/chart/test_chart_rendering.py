"""What helm makes of the chart, without a cluster."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart_release import CHART, REFUSAL_KIND, ROOT, Helm, HelmError, Object, named

from weightsync_contract import names
from weightsync_operator.settings import parse as parse_operator

VALUES = sorted((Path(__file__).parent / "values").glob("*.yaml"))
RBAC = ("Role", "ClusterRole")
POLICY_KIND = "admissionregistration.k8s.io/{}/MutatingAdmissionPolicy"


def rules(objects: list[Object]) -> dict[tuple[str, str], list[Any]]:
    """The rules of every role, by kind and name, in an order of their own."""
    return {
        (each["kind"], each["metadata"]["name"]): sorted(each["rules"], key=str)
        for each in objects
        if each["kind"] in RBAC and not for_people(each)
    }


def for_people(role: Object) -> bool:
    """Whether a role is added to the cluster's own ones, and bound to nobody by the chart."""
    return any("aggregate-to" in label for label in role["metadata"].get("labels", {}))


def operator(objects: list[Object]) -> Object:
    (container,) = named(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    return container


@pytest.mark.parametrize("values", [None, *VALUES], ids=lambda path: path.stem if path else "defaults")
def test_helm_finds_nothing_to_object_to(helm: Helm, values: Path | None) -> None:
    said = helm.run("lint", "--strict", str(CHART), *((f"--values={values}",) if values else ()))
    assert "0 chart(s) failed" in said


def test_the_values_file_of_the_tests_sets_every_value() -> None:
    everything = yaml.safe_load((Path(__file__).parent / "values/everything.yaml").read_text())
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    # It says that one namespace is looked after, which the selector of namespaces excludes.
    assert set(everything) == set(defaults) - {"watchNamespace"}
    assert {name for name, value in everything.items() if value == defaults[name]} == {
        "podDisruptionBudget",
    }


def test_the_versions_are_the_projects() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    members = {
        tomllib.loads((ROOT / member / "pyproject.toml").read_text())["project"]["version"]
        for member in ("contract", "engine", "operator")
    }
    assert {chart["version"], chart["appVersion"]} == members


def test_the_crd_is_the_one_of_the_project(helm: Helm) -> None:
    (source,) = (ROOT / "crds").glob("*.yaml")
    crd = named(helm.template(), "CustomResourceDefinition")
    assert crd["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert crd["metadata"].pop("labels")["app.kubernetes.io/part-of"] == "weightsync"
    assert crd == yaml.safe_load(source.read_text())


def test_a_packaged_chart_holds_the_crd_itself(helm: Helm, tmp_path: Path) -> None:
    helm.run("package", str(CHART), f"--destination={tmp_path}")
    (package,) = tmp_path.glob("*.tgz")
    rendered = helm.run("template", "weightsync", str(package))
    assert "kind: CustomResourceDefinition" in rendered


def test_the_crd_can_be_left_out_or_be_removed_with_the_release(helm: Helm) -> None:
    kinds = {each["kind"] for each in helm.template(crds={"enabled": False})}
    assert "CustomResourceDefinition" not in kinds
    crd = named(helm.template(crds={"keep": False}), "CustomResourceDefinition")
    assert "annotations" not in crd["metadata"]


def test_the_operator_may_do_what_the_list_of_reasons_says_and_no_more(helm: Helm) -> None:
    listed = list(yaml.safe_load_all((ROOT / "examples/operator-rbac.yaml").read_text()))
    assert rules(helm.template()) == rules(listed)


def test_every_role_is_bound_to_the_operators_account_alone(helm: Helm) -> None:
    for values in ({}, {"watchNamespace": "team"}):
        objects = helm.template(**values)
        account = {"kind": "ServiceAccount", "name": "weightsync-operator", "namespace": "weightsync-system"}
        bindings = [each for each in objects if each["kind"].endswith("RoleBinding")]
        bound = {
            (b["roleRef"]["kind"], b["roleRef"]["name"], b["metadata"].get("namespace")) for b in bindings
        }
        assert all(binding["subjects"] == [account] for binding in bindings)
        assert bound == {
            (r["kind"], r["metadata"]["name"], r["metadata"].get("namespace"))
            for r in objects
            if r["kind"] in RBAC and not for_people(r)
        }


def test_for_one_namespace_the_rights_are_there_only(helm: Helm) -> None:
    everywhere, here = helm.template(), helm.template(watchNamespace="team")
    watched = named(here, "Role", "weightsync-operator-watched")
    assert watched["metadata"]["namespace"] == "team"
    assert watched["rules"] == named(everywhere, "ClusterRole", "weightsync-operator")["rules"]
    # Reviews are in no namespace.
    assert [r["metadata"]["name"] for r in here if r["kind"] == "ClusterRole" and not for_people(r)] == [
        "weightsync-operator-team-reviews"
    ]
    assert "--namespace=team" in operator(here)["args"]
    assert "--all-namespaces" in operator(everywhere)["args"]


def test_with_a_certificate_of_ones_own_there_are_no_rights_to_secrets(helm: Helm) -> None:
    objects = helm.template(session={"certificateSecret": "session-tls"})
    assert "secrets" not in str(rules(objects))
    assert "configmaps" not in str(rules(objects))
    container = operator(objects)
    assert "--session-cert=/etc/weightsync/session/tls.crt" in container["args"]
    assert {"name": "session", "mountPath": "/etc/weightsync/session", "readOnly": True} in container[
        "volumeMounts"
    ]


def test_agents_dial_the_service_that_the_certificate_is_for(helm: Helm) -> None:
    objects = helm.template(has=[POLICY_KIND.format("v1")], fullnameOverride="sync", namespace="elsewhere")
    assert "--session-service=sync.elsewhere.svc" in operator(objects)["args"]
    policy = named(objects, "MutatingAdmissionPolicy")
    assert f"wss://sync.elsewhere.svc:{names.SESSION_PORT}" in str(policy)
    service = named(objects, "Service", "sync")
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    assert ports == {"session": names.SESSION_PORT, "metrics": names.METRICS_PORT}
    pod = named(objects, "Deployment")["spec"]["template"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()


def test_the_ports_are_those_that_the_operator_listens_on(helm: Helm) -> None:
    ports = {port["name"]: port["containerPort"] for port in operator(helm.template())["ports"]}
    assert ports == {
        "session": names.SESSION_PORT,
        "health": names.HEALTH_PORT,
        "metrics": names.METRICS_PORT,
    }


@pytest.mark.parametrize("values", [None, *VALUES], ids=lambda path: path.stem if path else "defaults")
def test_the_operators_flags_are_flags(helm: Helm, values: Path | None) -> None:
    objects = helm.template(*((values,) if values else ()))
    container = operator(objects)
    fields = {each["name"] for each in container["env"] if "valueFrom" in each}
    assert fields == {"POD_NAMESPACE", "POD_NAME", "POD_IP"}
    settings = parse_operator(container["args"], dict.fromkeys(fields, "10.0.0.9"))
    # Where followers send agents to, and everywhere: the kubelet asks the pod's own address.
    assert (settings.advertised_host, settings.session_host) == ("10.0.0.9", "0.0.0.0")
    assert (settings.session_port, settings.health_port) == (names.SESSION_PORT, names.HEALTH_PORT)
    if values is None:
        assert (settings.namespace, settings.log_format) == ("", "json")
        assert settings.session_service == "weightsync-operator.weightsync-system.svc"


def test_images_go_by_their_digests(helm: Helm) -> None:
    objects = helm.template(Path(__file__).parent / "values/release.yaml", has=[POLICY_KIND.format("v1")])
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    digest = f"sha256:{'0' * 63}"
    assert operator(objects)["image"] == f"registry.example:5000/weightsync/operator:{version}@{digest}1"
    assert f'"registry.example:5000/weightsync/agent:0.1.0@{digest}2"' in str(
        named(objects, "MutatingAdmissionPolicy")
    )


@pytest.mark.parametrize(
    ("has", "version"),
    [
        (["v1", "v1beta1", "v1alpha1"], "v1"),
        (["v1beta1", "v1alpha1"], "v1beta1"),
        (["v1alpha1"], "v1alpha1"),
    ],
)
def test_the_policy_is_of_the_newest_version_that_the_cluster_has(
    helm: Helm, has: list[str], version: str
) -> None:
    objects = helm.template(has=[POLICY_KIND.format(each) for each in has])
    for kind in ("MutatingAdmissionPolicy", "MutatingAdmissionPolicyBinding"):
        assert named(objects, kind)["apiVersion"] == f"admissionregistration.k8s.io/{version}"


def test_a_cluster_without_the_policy_gets_none_and_is_told(helm: Helm) -> None:
    kinds = {each["kind"] for each in helm.template(has=[REFUSAL_KIND])}
    assert "MutatingAdmissionPolicy" not in kinds
    refusal = named(helm.template(has=[REFUSAL_KIND]), "ValidatingAdmissionPolicy")
    assert "examples/on-a-cluster/sidecar" in str(refusal)
    notes = helm.run("install", "weightsync", str(CHART), "--dry-run=client", "--namespace=here")
    assert "NOTE: no agent is injected: this cluster has no MutatingAdmissionPolicy" in notes
    assert "wss://weightsync-operator.here.svc:8443" in notes


def test_nothing_is_injected_where_that_is_not_wanted(helm: Helm) -> None:
    objects = helm.template(has=[POLICY_KIND.format("v1"), REFUSAL_KIND], injection={"enabled": False})
    assert not [each["kind"] for each in objects if "AdmissionPolicy" in each["kind"]]


def test_the_policies_are_for_pods_with_the_label_only(helm: Helm) -> None:
    objects = helm.template(has=[POLICY_KIND.format("v1"), REFUSAL_KIND])
    for kind in ("MutatingAdmissionPolicy", "ValidatingAdmissionPolicy"):
        spec = named(objects, kind)["spec"]
        assert spec["failurePolicy"] == "Fail"
        assert spec["matchConstraints"]["objectSelector"] == {"matchLabels": {names.LABEL_INJECT: "true"}}
        assert spec["matchConstraints"]["resourceRules"] == [
            {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
        ]


def test_the_replicas_are_spread_and_none_is_missed_in_an_upgrade(helm: Helm) -> None:
    objects = helm.template()
    spec = named(objects, "Deployment")["spec"]
    assert (spec["replicas"], spec["strategy"]["rollingUpdate"]) == (2, {"maxSurge": 1, "maxUnavailable": 0})
    spread = spec["template"]["spec"]["topologySpreadConstraints"]
    assert [(each["topologyKey"], each["whenUnsatisfiable"]) for each in spread] == [
        ("kubernetes.io/hostname", "DoNotSchedule"),
        # Two wishes would be none: nodes without a zone, which most have, would be left out of both.
        ("topology.kubernetes.io/zone", "ScheduleAnyway"),
    ]
    assert spread[0]["nodeTaintsPolicy"] == "Honor"
    assert named(objects, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


IMAGE = {"repository": "a"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"replicaCount": 2}, "additional properties 'replicaCount' not allowed"),
        ({"replicas": 0}, "at '/replicas': minimum"),
        ({"replicas": "two"}, "at '/replicas': got string, want integer"),
        ({"logFormat": "JSON"}, "at '/logFormat': value must be one of 'json', 'text'"),
        ({"watchNamespace": "My Team"}, "at '/watchNamespace': 'My Team' does not match pattern"),
        ({"fullnameOverride": "9a"}, "at '/fullnameOverride': '9a' does not match pattern"),
        ({"image": {"repository": ""}}, "at '/image/repository'"),
        ({"image": {"repository": "a/b:1.0"}}, "at '/image/repository': 'a/b:1.0' does not match pattern"),
        ({"image": IMAGE | {"digest": "abc"}}, "at '/image/digest': 'abc' does not match pattern"),
        ({"image": IMAGE | {"tag": 1.0}}, "at '/image/tag': got number, want string"),
        ({"image": IMAGE | {"pullPolicy": "Sometimes"}}, "at '/image/pullPolicy': value must be one of"),
        ({"imagePullSecrets": ["registry"]}, "at '/imagePullSecrets/0': got string, want object"),
        ({"crds": {"enable": True}}, "at '/crds': additional properties 'enable' not allowed"),
        ({"crds": {"keep": "yes"}}, "at '/crds/keep': got string, want boolean"),
        (
            {"resources": {"limits": {"memory": "lots"}}},
            "at '/resources/limits/memory': 'lots' does not match",
        ),
        ({"nodeSelector": {"gpu": True}}, "at '/nodeSelector/gpu': got boolean, want string"),
        ({"affinity": {"antiAffinity": {}}}, "additional properties 'antiAffinity' not allowed"),
        (
            {"extraArgs": ["lease-duration=30"]},
            "at '/extraArgs/0': 'lease-duration=30' does not match pattern",
        ),
        ({"injection": {"apiVersion": "v2"}}, "at '/injection/apiVersion': value must be one of"),
        ({"injection": {"failurePolicy": "Ignore"}}, "additional properties 'failurePolicy' not allowed"),
        ({"agent": {"healthPort": 80}}, "at '/agent/healthPort': minimum: got 80, want 1,024"),
        ({"agent": {"env": [{"name": "A", "value": 1}]}}, "at '/agent/env/0/value': got number, want string"),
        (
            {"watchNamespace": "team", "injection": {"namespaceSelector": {"matchLabels": {"a": "b"}}}},
            "leave injection.namespaceSelector out, or watchNamespace",
        ),
        ({"networkPolicy": {"metricsFrom": [{}]}}, "at '/networkPolicy/metricsFrom/0': minProperties"),
        ({"networkPolicy": {"fleets": ["team"]}}, "at '/networkPolicy/fleets/0': got string, want object"),
        ({"networkPolicy": {"apiServerPorts": []}}, "at '/networkPolicy/apiServerPorts': minItems"),
        ({"metrics": {"serviceMonitor": {"interval": "often"}}}, "at '/metrics/serviceMonitor/interval'"),
        ({"liveView": {"readers": [{"kind": "Team", "name": "a"}]}}, "at '/liveView/readers/0/kind'"),
        (
            {"networkPolicy": {"enabled": True}, "metrics": {"serviceMonitor": {"enabled": True}}},
            "name your Prometheus in networkPolicy.metricsFrom",
        ),
        ({"serviceAccount": {"create": False}}, "name the ServiceAccount to use in serviceAccount.name"),
    ],
    ids=lambda case: "-".join(re.findall(r"\w+", str(case)))[:50] if isinstance(case, dict) else "",
)
def test_a_mistake_in_the_values_is_refused_and_named(helm: Helm, values: dict[str, Any], said: str) -> None:
    with pytest.raises(HelmError) as refused:
        helm.template(**values)
    assert said in str(refused.value)


def test_every_value_is_in_the_schema_and_explained() -> None:
    defaults = (CHART / "values.yaml").read_text()
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())
    assert set(schema["properties"]) - {"global"} == set(yaml.safe_load(defaults))
