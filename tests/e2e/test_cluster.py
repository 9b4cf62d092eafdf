"""The cluster under the other end-to-end tests does what a cluster does, and leaves nothing behind."""

from typing import Any

import pytest

from weightsync_cluster.cluster import Cluster
from weightsync_cluster.errors import ClusterError
from weightsync_cluster.images import BUSYBOX
from weightsync_cluster.kubectl import KubectlCluster, Namespace
from weightsync_cluster.shell import run
from weightsync_demo.kube.build import PROGRAMS, Binaries
from weightsync_demo.kube.source import find_source
from weightsync_demo.waiting import wait_for

# What a pod needs to be Ready here; more means that it will not be.
POD_S = 60.0
SERVE = "mkdir -p /tmp/www; echo {text} > /tmp/www/index.html; exec httpd -f -p 8080 -h /tmp/www"


def pod(name: str, script: str, on: str | None = None, **more: Any) -> dict[str, Any]:
    """A pod that runs `script` until it is told to end."""
    container = {
        "name": "main",
        "image": BUSYBOX,
        "command": ["sh", "-c", script],
        **more.pop("container", {}),
    }
    spec = {"terminationGracePeriodSeconds": 0, "containers": [container], **more}
    if on is not None:
        spec["nodeSelector"] = {"kubernetes.io/hostname": on}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": spec,
    }


def server(name: str, on: str | None = None) -> dict[str, Any]:
    """A pod that answers its own name on port 8080."""
    probe = {"readinessProbe": {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1}}
    return pod(name, SERVE.format(text=name), on, container=probe)


def fetch(namespace: Namespace, who: str, url: str) -> str:
    """What `who` is answered; ClusterError where nobody answers."""
    return namespace.run_in(who, "timeout", "2", "wget", "-q", "-O", "-", url).strip()


def fetch_in_time(namespace: Namespace, who: str, url: str) -> str:
    """As `fetch`, once the nodes have heard of the Service."""
    return wait_for(lambda: fetch(namespace, who, url), 20, f"{who} to reach {url}", ignoring=ClusterError)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_in_the_one_binary_runs(binaries: Binaries, program: str) -> None:
    # Flags that one package gives to all have stopped another's program from starting.
    question = {"kubectl": ["version", "--client"], "coredns": ["-version"]}.get(program, ["--version"])
    answer = run([binaries.program(program), *question])
    assert (find_source().kubernetes if program.startswith("kube") else ".") in answer


def test_both_nodes_are_ready(cluster: KubectlCluster) -> None:
    assert len(cluster.nodes) >= 2
    assert all(cluster.node_ready(name) for name in cluster.nodes)


def test_pods_on_two_nodes_talk_to_each_other(cluster: KubectlCluster, namespace: Namespace) -> None:
    names = ["left", "right"]
    namespace.apply(*(server(name, on) for name, on in zip(names, cluster.nodes, strict=False)))
    for name in names:
        namespace.wait(f"pod/{name}", "Ready", POD_S)
    for one, other in (names, names[::-1]):
        assert fetch(namespace, one, f"http://{namespace.address(other)}:8080") == other


def test_a_service_is_found_by_its_name_from_each_node(cluster: KubectlCluster, namespace: Namespace) -> None:
    service = {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]}
    namespace.apply(
        server("web", cluster.nodes[0]),
        *(pod(f"asks-{on}", "sleep 600", on) for on in cluster.nodes),
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": service},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "headless"},
            "spec": {**service, "clusterIP": "None"},
        },
    )
    namespace.wait("pod/web", "Ready", POD_S)
    for on in cluster.nodes:
        namespace.wait(f"pod/asks-{on}", "Ready", POD_S)
        for host in ("web", f"web.{namespace.name}.svc", f"web.{namespace.name}.svc.cluster.local"):
            assert fetch_in_time(namespace, f"asks-{on}", f"http://{host}") == "web"
        told = namespace.run_in(f"asks-{on}", "nslookup", f"headless.{namespace.name}.svc.cluster.local")
        assert namespace.address("web") in told
        with pytest.raises(ClusterError):
            fetch(namespace, f"asks-{on}", "http://nobody")


def test_a_native_sidecar_starts_first_and_does_not_keep_a_job_running(namespace: Namespace) -> None:
    mounts = [{"name": "shared", "mountPath": "/shared"}]
    sidecar = {
        "name": "sidecar",
        "image": BUSYBOX,
        "restartPolicy": "Always",
        "command": ["sh", "-c", "sleep 1; echo ready > /shared/file; exec sleep 600"],
        "startupProbe": {"exec": {"command": ["cat", "/shared/file"]}, "periodSeconds": 1},
        "volumeMounts": mounts,
    }
    made = pod(
        "works",
        "cat /shared/file",
        initContainers=[sidecar],
        volumes=[{"name": "shared", "emptyDir": {}}],
        restartPolicy="Never",
        container={"volumeMounts": mounts},
    )
    template = {"metadata": made["metadata"], "spec": made["spec"]}
    job = {"backoffLimit": 0, "template": template}
    namespace.apply({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "work"}, "spec": job})
    namespace.wait("job/work", "Complete", POD_S)
    assert namespace.kubectl("logs", "job/work", "--container=main").strip() == "ready"


def test_a_pod_speaks_to_the_api_server_with_its_token(own_cluster: Cluster, namespace: Namespace) -> None:
    # kubectl trusts the cluster's authority only, and says who it is by the token that was mounted.
    programs = own_cluster.kubectl_program.parent
    mount = {"name": "programs", "mountPath": "/kubernetes", "readOnly": True}
    asks = pod(
        "asks",
        "sleep 600",
        volumes=[{"name": "programs", "hostPath": {"path": str(programs), "type": "Directory"}}],
        container={"volumeMounts": [mount]},
    )
    namespace.apply(asks)
    namespace.wait("pod/asks", "Ready", POD_S)
    question = ("/kubernetes/kubectl", "get", "pods", "--output=name", f"--namespace={namespace.name}")
    with pytest.raises(ClusterError, match=f"system:serviceaccount:{namespace.name}:default.*cannot list"):
        namespace.run_in("asks", *question)
    account = f"--serviceaccount={namespace.name}:default"
    namespace.kubectl("create", "rolebinding", "reads", "--clusterrole=view", account)
    answer = wait_for(
        lambda: namespace.run_in("asks", *question), 20, "the role to be known", ignoring=ClusterError
    )
    assert answer.strip() == "pod/asks"


def test_a_partition_cuts_two_pods_and_no_more(own_cluster: Cluster, namespace: Namespace) -> None:
    first, second = own_cluster.nodes
    namespace.apply(server("a", first), server("b", first), server("c", second))
    for name in "abc":
        namespace.wait(f"pod/{name}", "Ready", POD_S)
    address = {name: namespace.address(name) for name in "abc"}

    def reaches(one: str, other: str) -> bool:
        try:
            return fetch(namespace, one, f"http://{address[other]}:8080") == other
        except ClusterError:
            return False

    own_cluster.partition([address["a"]], [address["b"], address["c"]])
    try:
        # On one node, and from one to the other.
        assert not reaches("a", "b")
        assert not reaches("c", "a")
        assert reaches("b", "c")
        assert own_cluster.get(f"http://{address['a']}:8080").text.strip() == "a"
    finally:
        own_cluster.heal()
    assert reaches("a", "b")
    assert reaches("c", "a")


def test_a_node_that_is_cut_off_stays_up_and_is_not_ready(own_cluster: Cluster) -> None:
    name = own_cluster.nodes[1]
    own_cluster.partition([name], ["control"])
    try:
        wait_for(lambda: not own_cluster.node_ready(name), 60, f"{name} to be NotReady")
    finally:
        own_cluster.heal()
    wait_for(lambda: own_cluster.node_ready(name), 60, f"{name} to be Ready again")


def test_a_killed_node_is_soon_not_ready_and_comes_back_with_its_pods(
    own_cluster: Cluster, namespace: Namespace
) -> None:
    name = own_cluster.nodes[1]
    namespace.apply(server("web", name))
    namespace.wait("pod/web", "Ready", POD_S)
    before = own_cluster.read("node", name)["status"]["nodeInfo"]["bootID"]
    own_cluster.kill_node(name)
    wait_for(lambda: not own_cluster.node_ready(name), 60, f"{name} to be NotReady")
    wait_for(
        lambda: "False" in {c["status"] for c in conditions(namespace, "web") if c["type"] == "Ready"},
        30,
        "its pod to be no longer Ready",
    )
    own_cluster.start_node(name)
    wait_for(
        lambda: namespace.read("pod", "web")["status"]["containerStatuses"][0]["restartCount"] == 1,
        60,
        "the pod's container to be started again",
    )
    namespace.wait("pod/web", "Ready", POD_S)
    assert own_cluster.get(f"http://{namespace.address('web')}:8080").text.strip() == "web"
    assert own_cluster.read("node", name)["status"]["nodeInfo"]["bootID"] != before


def conditions(namespace: Namespace, name: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = namespace.read("pod", name)["status"]["conditions"]
    return found


def test_bringing_up_what_is_up_changes_nothing(own_cluster: Cluster) -> None:
    before = own_cluster.control.pid
    own_cluster.up()
    assert own_cluster.control.pid == before
