"""The policies of the chart at a real API server: which pods come out, and which are refused."""

import json
import re

import pytest
from chart_pods import RESTRICTED, Object, container, create, new_pod, without_agent
from chart_release import ROOT

from weightsync_contract import names
from weightsync_contract.messages import PodRef
from weightsync_demo.kube.apiserver import ApiServer
from weightsync_demo.kube.errors import KubectlError
from weightsync_engine.agent.config import parse as parse_agent

AGENT = "weightsync-agent"
OWN_MOUNT = {"name": "weightsync-run", "mountPath": "/run/weightsync"}
OWN_ENV = {"name": "WEIGHTSYNC_DIR", "value": "/run/weightsync"}


def agent_of(pod: Object) -> Object:
    (agent,) = (each for each in pod["spec"]["initContainers"] if each["name"] == AGENT)
    return agent


def environment(container: Object, pod: Object) -> dict[str, str]:
    """A container's environment as a kubelet makes it: what a field does not have is empty."""
    env = {}
    for each in container["env"]:
        value = each.get("value")
        if value is None:
            path = each["valueFrom"]["fieldRef"]["fieldPath"]
            kind, field, key = re.fullmatch(r"(\w+)\.(\w+)(?:\['(.*)'\])?", path).groups()
            found = pod[kind].get(field, "")
            value = found if key is None else dict(found or {}).get(key, "")
        env[each["name"]] = value
    return env


def test_a_bare_pod_gets_an_agent_and_all_that_belongs_to_it(installed: ApiServer, place: str) -> None:
    pod = create(installed, new_pod(place))
    agent = agent_of(pod)
    assert agent["image"].startswith("weightsync/agent:")
    assert agent["restartPolicy"] == "Always"
    env = {
        each["name"]: each.get("value") or each["valueFrom"]["fieldRef"]["fieldPath"] for each in agent["env"]
    }
    assert env == {
        "WEIGHTSYNC_ROLE": "metadata.labels['weightsync.dev/role']",
        "WEIGHTSYNC_OPERATOR": "wss://weightsync-operator.weightsync-system.svc:8443",
        "WEIGHTSYNC_OPERATOR_CA": "/var/run/secrets/weightsync.dev/ca/ca.crt",
        "WEIGHTSYNC_TOKEN_FILE": "/var/run/secrets/weightsync.dev/token/token",
        "WEIGHTSYNC_ENGINE_URL": "metadata.annotations['weightsync.dev/engine-url']",
        "WEIGHTSYNC_LIMIT_RATE": "metadata.annotations['weightsync.dev/limit-rate']",
        "WEIGHTSYNC_DIR": "/run/weightsync",
        "WEIGHTSYNC_STATE_DIR": "/var/lib/weightsync",
        "WEIGHTSYNC_HEALTH_PORT": "8081",
        "WEIGHTSYNC_LOG_FORMAT": "json",
        "POD_NAMESPACE": "metadata.namespace",
        "POD_NAME": "metadata.name",
        "POD_IP": "status.podIP",
        "POD_UID": "metadata.uid",
    }
    assert agent["securityContext"] == RESTRICTED | {
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert agent["volumeMounts"] == [
        OWN_MOUNT,
        {"name": "weightsync-state", "mountPath": "/var/lib/weightsync"},
        {"name": "weightsync-tmp", "mountPath": "/tmp"},
        {"name": "weightsync-token", "mountPath": "/var/run/secrets/weightsync.dev/token", "readOnly": True},
        {"name": "weightsync-ca", "mountPath": "/var/run/secrets/weightsync.dev/ca", "readOnly": True},
    ]
    probes = {name: agent[name]["httpGet"]["path"] for name in agent if name.endswith("Probe")}
    assert probes == {"startupProbe": "/healthz", "readinessProbe": "/readyz", "livenessProbe": "/healthz"}
    token = {"audience": names.TOKEN_AUDIENCE, "expirationSeconds": 3600, "path": "token"}
    assert pod["spec"]["volumes"] == [
        {"name": "weightsync-run", "emptyDir": {}},
        {"name": "weightsync-state", "emptyDir": {}},
        {"name": "weightsync-tmp", "emptyDir": {}},
        {
            "name": "weightsync-token",
            "projected": {"defaultMode": 420, "sources": [{"serviceAccountToken": token}]},
        },
        {
            "name": "weightsync-ca",
            "configMap": {"name": "weightsync-ca", "optional": True, "defaultMode": 420},
        },
    ]
    (engine,) = pod["spec"]["containers"]
    assert (engine["volumeMounts"], engine["env"]) == ([OWN_MOUNT], [OWN_ENV])
    untouched = create(installed, new_pod(place, inject=None))
    assert without_agent(pod) == untouched["spec"]


@pytest.mark.parametrize(
    ("annotations", "engine", "rate"),
    [
        ({}, "http://127.0.0.1:8000", 0),
        (
            {"weightsync.dev/engine-url": "http://127.0.0.1:9000", "weightsync.dev/limit-rate": "200MiB"},
            "http://127.0.0.1:9000",
            200 << 20,
        ),
    ],
)
def test_the_agent_understands_what_it_is_given(
    installed: ApiServer, place: str, annotations: dict[str, str], engine: str, rate: int
) -> None:
    pod = create(installed, new_pod(place, annotations=annotations))
    pod["status"]["podIP"] = "10.0.0.9"
    config = parse_agent([], environment(agent_of(pod), pod))
    assert (config.role, config.engine_url, config.limit_rate) == ("inference", engine, rate)
    assert config.pod == PodRef(place, "engine-0", pod["metadata"]["uid"])
    assert (config.pod_ip, config.health_port, config.log_format) == ("10.0.0.9", 8081, "json")
    mounted = {each["mountPath"] for each in agent_of(pod)["volumeMounts"]}
    assert config.operator_ca
    assert {str(config.directory), str(config.state_directory)} <= mounted
    assert {str(config.token_file.parent), str(config.operator_ca.parent)} <= mounted
    assert config.operator_ca.name == names.CA_FILE


@pytest.mark.parametrize("role", ["trainer", "inference"])
def test_what_the_pod_has_stays_behind_what_the_agent_brings(
    installed: ApiServer, place: str, role: str
) -> None:
    engine = container(
        "engine",
        env=[{"name": "MODEL", "value": "m"}],
        volumeMounts=[{"name": "model", "mountPath": "/model"}],
    )
    other = container("other", volumeMounts=[{"name": "model", "mountPath": "/m"}])
    more = {
        "initContainers": [container("download"), container("tune")],
        "volumes": [{"name": "model", "emptyDir": {}}],
    }
    pod = create(installed, new_pod(place, engine, other, role=role, **more))
    assert [each["name"] for each in pod["spec"]["initContainers"]] == [AGENT, "download", "tune"]
    served, neighbour = pod["spec"]["containers"]
    assert served["env"] == [OWN_ENV, {"name": "MODEL", "value": "m"}]
    assert served["volumeMounts"] == [OWN_MOUNT, {"name": "model", "mountPath": "/model"}]
    assert neighbour["volumeMounts"] == [{"name": "model", "mountPath": "/m"}]
    assert pod["spec"]["volumes"][-1] == {"name": "model", "emptyDir": {}}
    untouched = create(installed, new_pod(place, engine, other, role=role, inject=None, **more))
    assert without_agent(pod) == untouched["spec"]


def test_the_annotation_names_the_container_that_the_agent_is_for(installed: ApiServer, place: str) -> None:
    annotations = {"weightsync.dev/container": "engine"}
    containers = (container("proxy"), container("engine"), container("logs"))
    pod = create(installed, new_pod(place, *containers, annotations=annotations))
    mounted = [
        each["name"] for each in pod["spec"]["containers"] if OWN_MOUNT in each.get("volumeMounts", [])
    ]
    assert mounted == ["engine"]


def test_volumes_and_settings_that_the_pod_brings_itself_are_kept(installed: ApiServer, place: str) -> None:
    state = {"name": "weightsync-state", "emptyDir": {"sizeLimit": "1Ti"}}
    engine = container("engine", env=[OWN_ENV], volumeMounts=[OWN_MOUNT])
    pod = create(installed, new_pod(place, engine, volumes=[state]))
    assert [v for v in pod["spec"]["volumes"] if v["name"] == "weightsync-state"] == [state]
    assert pod["spec"]["containers"][0]["env"] == [OWN_ENV]
    assert pod["spec"]["containers"][0]["volumeMounts"] == [OWN_MOUNT]


@pytest.mark.parametrize("inject", [None, "false"])
def test_a_pod_that_does_not_ask_is_left_alone(installed: ApiServer, place: str, inject: str | None) -> None:
    # A pod that the policies would refuse, if they looked.
    pod = create(
        installed, new_pod(place, inject=inject, role="", annotations={"weightsync.dev/container": "none"})
    )
    assert "initContainers" not in pod["spec"]
    assert "volumes" not in pod["spec"]


def test_a_pod_that_has_an_agent_is_left_alone(installed: ApiServer, place: str) -> None:
    own = container(AGENT, restartPolicy="Always", image="example.dev/agent:own")
    pod = create(installed, new_pod(place, initContainers=[own]))
    assert [each["image"] for each in pod["spec"]["initContainers"]] == ["example.dev/agent:own"]
    assert "volumes" not in pod["spec"]


def test_a_pod_that_is_there_already_is_never_changed(installed: ApiServer, place: str) -> None:
    before = create(installed, new_pod(place, inject=None), keep=True)
    changed = {"metadata": {"labels": {names.LABEL_INJECT: "true"}, "annotations": {"a": "b"}}}
    after = json.loads(
        installed.kubectl(
            *("patch", "pod", before["metadata"]["name"], f"--namespace={place}", "--output=json"),
            f"--patch={json.dumps(changed)}",
        )
    )
    assert after["metadata"]["labels"][names.LABEL_INJECT] == "true"
    assert after["spec"] == before["spec"]


@pytest.mark.parametrize(
    ("pod", "said"),
    [
        ({"role": ""}, "label the pod weightsync.dev/role=trainer or weightsync.dev/role=inference"),
        ({"role": "engine"}, "label the pod weightsync.dev/role=trainer or weightsync.dev/role=inference"),
        (
            {"annotations": {"weightsync.dev/container": "vllm"}},
            "the annotation weightsync.dev/container names vllm, and the pod's containers are engine",
        ),
    ],
)
def test_a_pod_that_can_have_no_agent_that_works_is_refused(
    installed: ApiServer, place: str, pod: Object, said: str
) -> None:
    with pytest.raises(KubectlError, match="denied request") as refused:
        create(installed, new_pod(place, **pod))
    assert said in str(refused.value)


def test_engine_and_agent_have_to_be_one_user(installed: ApiServer, place: str) -> None:
    alone = container("engine")
    alone["securityContext"] = RESTRICTED | {"runAsUser": 1000}
    with pytest.raises(KubectlError, match="set runAsUser in the pod's securityContext"):
        create(installed, new_pod(place, alone))
    both = new_pod(place, alone)
    both["spec"]["securityContext"] = both["spec"]["securityContext"] | {"runAsUser": 1000}
    assert agent_of(create(installed, both))


def test_the_agent_runs_under_what_kubernetes_calls_restricted(installed: ApiServer, place: str) -> None:
    # The namespace refuses anything else: a pod that is less than that does not come in.
    with pytest.raises(KubectlError, match='violates PodSecurity "restricted'):
        create(installed, new_pod(place, {"name": "engine", "image": "any"}))
    assert agent_of(create(installed, new_pod(place)))["securityContext"]["runAsNonRoot"] is True


def test_the_names_in_the_chart_are_those_of_the_contract() -> None:
    chart = "".join(path.read_text() for path in (ROOT / "charts/weightsync/templates").iterdir())
    for name in (names.LABEL_INJECT, names.LABEL_ROLE, names.CA_NAME, names.CA_FILE, names.LEASE_NAME):
        assert name in chart
