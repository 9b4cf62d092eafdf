"""Agents that share their pod's GPUs, at a real API server: the claim, and one /dev/shm for both containers."""

from typing import Any

import pytest
from chart_pods import Object, container, create, new_pod, without_agent

from weightsync_demo.kube.apiserver import ApiServer
from weightsync_demo.kube.errors import KubectlError

AGENT = "weightsync-agent"
CLAIM: Object = {"weightsync.dev/claim": "gpu"}
CLAIMS: list[Object] = [
    {"name": "gpu", "resourceClaimTemplateName": "gpu"},
    {"name": "nic", "resourceClaimName": "nic"},
]
OWN_SHM: Object = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}}
NEW_SHM: Object = {"name": "weightsync-shm", "emptyDir": {"medium": "Memory"}}


def engine(*mounts: Object, claims: tuple[str, ...] = ("gpu",)) -> Object:
    given = [{"name": name} for name in claims]
    return container("engine", resources={"claims": given}, volumeMounts=list(mounts))


def pod_with_claim(place: str, *containers: Object, **more: Any) -> Object:
    more = {"annotations": CLAIM, "resourceClaims": CLAIMS} | more
    return new_pod(place, *containers, **more)


def shm_of(container: Object) -> list[Object]:
    return [each for each in container["volumeMounts"] if each["mountPath"].startswith("/dev/shm")]


def test_the_agent_gets_the_claim_and_both_get_one_dev_shm(installed: ApiServer, place: str) -> None:
    pod = create(installed, pod_with_claim(place, engine(), container("logs")))
    agent, (served, logs) = pod["spec"]["initContainers"][0], pod["spec"]["containers"]
    assert agent["name"] == AGENT
    assert agent["resources"] == {
        "claims": [{"name": "gpu"}],
        "requests": {"cpu": "100m", "memory": "256Mi"},
    }
    mount = {"name": "weightsync-shm", "mountPath": "/dev/shm"}
    assert (shm_of(agent), shm_of(served)) == ([mount], [mount])
    assert NEW_SHM in pod["spec"]["volumes"]
    assert "volumeMounts" not in logs
    untouched = create(installed, pod_with_claim(place, engine(), container("logs"), inject=None))
    assert without_agent(pod) == untouched["spec"]


@pytest.mark.parametrize("path", ["/dev/shm", "/dev/shm/"])
def test_the_memory_that_the_container_has_at_dev_shm_is_the_one_that_both_use(
    installed: ApiServer, place: str, path: str
) -> None:
    mount = {"name": "shm", "mountPath": path, "subPath": "a"}
    asked = pod_with_claim(place, engine(mount), volumes=[OWN_SHM])
    pod = create(installed, asked)
    assert shm_of(pod["spec"]["initContainers"][0]) == [mount]
    assert shm_of(pod["spec"]["containers"][0]) == [mount]
    assert NEW_SHM not in pod["spec"]["volumes"]


def test_a_pod_that_does_not_name_its_claim_keeps_its_gpus_for_itself(
    installed: ApiServer, place: str
) -> None:
    pod = create(installed, pod_with_claim(place, engine(), annotations=None))
    assert "claims" not in pod["spec"]["initContainers"][0]["resources"]
    assert not shm_of(pod["spec"]["initContainers"][0])
    assert not shm_of(pod["spec"]["containers"][0])


@pytest.mark.parametrize(
    ("pod", "said"),
    [
        (
            {"annotations": {"weightsync.dev/claim": "gpus"}},
            "the annotation weightsync.dev/claim names gpus, and the pod's resourceClaims are gpu, nic",
        ),
        (
            {"annotations": {"weightsync.dev/claim": "nic"}},
            "the agent gets the GPUs of the claim nic, and the container engine that it serves does not: name the"
            " claim under its resources.claims, too",
        ),
    ],
)
def test_an_agent_that_would_share_no_gpu_is_refused(
    installed: ApiServer, place: str, pod: Object, said: str
) -> None:
    with pytest.raises(KubectlError, match="denied request") as refused:
        create(installed, pod_with_claim(place, engine(), **pod))
    assert said in str(refused.value)


def test_a_claim_in_a_pod_without_claims_is_refused(installed: ApiServer, place: str) -> None:
    with pytest.raises(KubectlError, match="names gpu, and the pod's resourceClaims are none"):
        create(installed, new_pod(place, annotations=CLAIM))
