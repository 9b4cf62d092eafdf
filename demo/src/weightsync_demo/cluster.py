"""What the demo does at the API server: pods in the kubelet's stead, tokens, the WeightSync."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from weightsync_contract.names import (
    API_VERSION,
    CA_FILE,
    CA_NAME,
    GROUP,
    LABEL_ROLE,
    PLURAL,
    TOKEN_AUDIENCE,
)
from weightsync_contract.reasons import Role

SCHEDULER: Final = "weightsync-demo"
"""Pods name a scheduler that does not exist, so that on a real cluster no node takes them."""

_NOT_FOUND: Final = 404
_CONFLICT: Final = 409
_TOKEN_SECONDS: Final = 3600


@dataclass(frozen=True)
class Pod:
    """A pod object of the demo's."""

    name: str
    uid: str


class Cluster:
    """The API server behind a kubeconfig, in one namespace."""

    def __init__(self, kubeconfig: Path, context: str | None, namespace: str, kubectl: Path | None) -> None:
        self.kubeconfig = kubeconfig
        self.context = context
        self.namespace = namespace
        self._kubectl = str(kubectl) if kubectl else "kubectl"
        api = config.new_client_from_config(str(kubeconfig), context=context)
        self._core = client.CoreV1Api(api)
        self._rbac = client.RbacAuthorizationV1Api(api)
        self._custom = client.CustomObjectsApi(api)

    def kubectl(self, *arguments: str) -> str:
        """Run kubectl on this cluster. Raises RuntimeError with what it printed."""
        command = [self._kubectl, f"--kubeconfig={self.kubeconfig}", f"--namespace={self.namespace}"]
        if self.context:
            command.append(f"--context={self.context}")
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def prepare(self) -> None:
        """Namespace, the pods' service account, and one that may read the fleet."""
        _unless_there(self._core.create_namespace, {"metadata": {"name": self.namespace}})
        for name in ("weightsync-demo", "weightsync-demo-viewer"):
            _unless_there(
                self._core.create_namespaced_service_account, self.namespace, {"metadata": {"name": name}}
            )
        rules = [{"apiGroups": [GROUP], "resources": [PLURAL], "verbs": ["get", "list", "watch"]}]
        name = "weightsync-demo-viewer"
        _unless_there(
            self._rbac.create_namespaced_role, self.namespace, {"metadata": {"name": name}, "rules": rules}
        )
        binding = {
            "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": self.namespace}],
        }
        _unless_there(self._rbac.create_namespaced_role_binding, self.namespace, binding)

    def create_pod(self, name: str, role: Role, app: str, command: str) -> Pod:
        """Create the pod object and say that it runs; its processes are the supervisor's."""
        self.delete_pod(name)
        body = {
            "metadata": {
                "name": name,
                "labels": {"app": app, LABEL_ROLE: str(role)},
                "annotations": {
                    f"{GROUP}/demo": "its processes are run by the demo's supervisor, no kubelet"
                },
            },
            "spec": {
                "schedulerName": SCHEDULER,
                # Bound to the pod only because it is named: the admission plugin that would set it is off.
                "serviceAccountName": "weightsync-demo",
                "automountServiceAccountToken": False,
                "containers": [{"name": app, "image": "none.invalid/process", "command": [command]}],
            },
        }
        created = self._core.create_namespaced_pod(self.namespace, body)
        status = {"status": {"phase": "Running", "podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}]}}
        self._core.patch_namespaced_pod_status(name, self.namespace, status)
        return Pod(name, created.metadata.uid)

    def pods(self) -> dict[str, Pod]:
        """The demo's pods that are there and not being deleted, by name."""
        items = self._core.list_namespaced_pod(self.namespace, label_selector=LABEL_ROLE).items
        return {
            item.metadata.name: Pod(item.metadata.name, item.metadata.uid)
            for item in items
            if item.metadata.deletion_timestamp is None
        }

    def delete_pod(self, name: str) -> None:
        """Delete it at once; no kubelet would answer for the grace period."""
        try:
            self._core.delete_namespaced_pod(name, self.namespace, grace_period_seconds=0)
        except ApiException as error:
            if error.status != _NOT_FOUND:
                raise

    def pod_token(self, pod: Pod) -> str:
        """A token for the agents' audience that is bound to the pod, as a kubelet projects it."""
        reference = {"kind": "Pod", "apiVersion": "v1", "name": pod.name, "uid": pod.uid}
        return self._token("weightsync-demo", [TOKEN_AUDIENCE], reference)

    def viewer_token(self) -> str:
        """A token that may read the WeightSync and so its fleet, as ``kubectl create token`` makes them."""
        return self._token("weightsync-demo-viewer", [], None)

    def bundle(self) -> str:
        """What the operator's certificate is checked with; empty as long as it is not published."""
        try:
            found = self._core.read_namespaced_config_map(CA_NAME, self.namespace)
        except ApiException as error:
            if error.status != _NOT_FOUND:
                raise
            return ""
        return str((found.data or {}).get(CA_FILE, ""))

    def weightsync(self, name: str) -> dict[str, Any]:
        """The WeightSync as it is."""
        found = self._custom.get_namespaced_custom_object(GROUP, API_VERSION, self.namespace, PLURAL, name)
        return json.loads(json.dumps(found))  # type: ignore[no-any-return]

    def _token(self, account: str, audiences: list[str], reference: dict[str, str] | None) -> str:
        spec: dict[str, Any] = {"audiences": audiences, "expirationSeconds": _TOKEN_SECONDS}
        if reference:
            spec["boundObjectRef"] = reference
        answer = self._core.create_namespaced_service_account_token(account, self.namespace, {"spec": spec})
        return str(answer.status.token)


def _unless_there(create: Any, *arguments: Any) -> None:
    try:
        create(*arguments)
    except ApiException as error:
        if error.status != _CONFLICT:
            raise
