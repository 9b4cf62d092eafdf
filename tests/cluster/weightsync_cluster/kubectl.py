"""A cluster as kubectl sees it, whoever made it."""

import json
from pathlib import Path
from typing import Any

from weightsync_cluster.errors import ClusterError
from weightsync_cluster.shell import run
from weightsync_demo.waiting import wait_for


class KubectlCluster:
    """What `kubeconfig` and one of its contexts lead to."""

    def __init__(self, kubectl_program: Path, kubeconfig: Path, context: str) -> None:
        self.kubectl_program = kubectl_program
        self.kubeconfig = kubeconfig
        self.context = context

    def kubectl(self, *arguments: str | Path, stdin: str = "", timeout: float = 60.0) -> str:
        """The output of kubectl; ClusterError if it fails or outlasts `timeout` s."""
        who = [f"--kubeconfig={self.kubeconfig}", f"--context={self.context}"]
        return run([self.kubectl_program, *who, *arguments], stdin=stdin, timeout=timeout)

    def read(self, *arguments: str) -> Any:
        """What `kubectl get` with these arguments finds, as it is in the API."""
        return json.loads(self.kubectl("get", *arguments, "--output=json"))

    @property
    def nodes(self) -> list[str]:
        """The names of the nodes that pods are put on."""
        found = self.read("nodes")["items"]
        return sorted(node["metadata"]["name"] for node in found if not node["spec"].get("taints"))

    def node_ready(self, name: str) -> bool:
        """Whether the API server has the node for Ready."""
        conditions = self.read("node", name)["status"]["conditions"]
        return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


class Namespace:
    """A namespace of `cluster`, to be made by `create` and removed by `delete`."""

    def __init__(self, cluster: KubectlCluster, name: str) -> None:
        self.cluster = cluster
        self.name = name

    def create(self) -> None:
        """Make it, and wait until pods can be made in it."""
        self.cluster.kubectl("create", "namespace", self.name)
        wait_for(
            lambda: self.kubectl("get", "serviceaccounts", "--output=name").split(),
            30,
            f"the ServiceAccount default in {self.name}",
        )

    def delete(self) -> None:
        """Remove it with all that is in it, without waiting for the end of that."""
        self.cluster.kubectl("delete", "namespace", self.name, "--wait=false")

    def kubectl(self, *arguments: str | Path, stdin: str = "", timeout: float = 60.0) -> str:
        """As the cluster's, in this namespace."""
        return self.cluster.kubectl(f"--namespace={self.name}", *arguments, stdin=stdin, timeout=timeout)

    def read(self, *arguments: str) -> Any:
        """As the cluster's, in this namespace."""
        return json.loads(self.kubectl("get", *arguments, "--output=json"))

    def apply(self, *objects: dict[str, Any]) -> None:
        """Apply API objects."""
        everything = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.kubectl("apply", "--server-side", "--filename=-", stdin=json.dumps(everything))

    def wait(self, what: str, condition: str, timeout: float) -> None:
        """Wait until `what` (pod/web) has `condition` (Ready); ClusterError with its description if not."""
        try:
            self.kubectl(
                "wait", what, f"--for=condition={condition}", f"--timeout={timeout:g}s", timeout=timeout + 10
            )
        except ClusterError as error:
            raise ClusterError(f"{error}\n{self.kubectl('describe', what)}") from error

    def address(self, pod: str) -> str:
        """The pod's IP address."""
        return str(self.read("pod", pod)["status"]["podIP"])

    def run_in(self, pod: str, *command: str, container: str = "", timeout: float = 30.0) -> str:
        """The output of a command run in a pod, in its first container unless another is named."""
        chosen = [f"--container={container}"] if container else []
        return self.kubectl("exec", pod, *chosen, "--", *command, timeout=timeout)
