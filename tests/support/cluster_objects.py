"""Objects that tests of the operator make at a real API server."""

import uuid
from collections.abc import Callable
from typing import Any

from kubernetes import client

from weightsync_contract.messages import PodRef
from weightsync_contract.names import API_VERSION, GROUP, KIND, LABEL_ROLE, PLURAL, TOKEN_AUDIENCE

Patch = dict[str, Any]


class ClusterObjects:
    """A namespace's WeightSyncs, pods and tokens."""

    def __init__(self, api_client: client.ApiClient, namespace: str) -> None:
        self.namespace = namespace
        self.core = client.CoreV1Api(api_client)
        self.custom = client.CustomObjectsApi(api_client)
        self.leases = client.CoordinationV1Api(api_client)
        self.rbac = client.RbacAuthorizationV1Api(api_client)

    def weightsync(self, name: str = "policy", app: str = "", **spec: Any) -> dict[str, Any]:
        """Create a WeightSync for the pods labelled app=<app>trainer and app=<app>vllm."""
        body = {
            "apiVersion": f"{GROUP}/{API_VERSION}",
            "kind": KIND,
            "metadata": {"name": name},
            "spec": {
                "trainer": {"selector": {"matchLabels": {"app": f"{app}trainer"}}},
                "inference": {"selector": {"matchLabels": {"app": f"{app}vllm"}}},
                **spec,
            },
        }
        created: dict[str, Any] = self.custom.create_namespaced_custom_object(*self._type(), body)
        return created

    def read(self, name: str = "policy") -> dict[str, Any]:
        found: dict[str, Any] = self.custom.get_namespaced_custom_object(*self._type(), name)
        return found

    def patch(self, patch: Patch, name: str = "policy") -> dict[str, Any]:
        changed: dict[str, Any] = self.custom.patch_namespaced_custom_object(*self._type(), name, patch)
        return changed

    def patch_status(self, status: Patch | None, name: str = "policy") -> dict[str, Any]:
        changed: dict[str, Any] = self.custom.patch_namespaced_custom_object_status(
            *self._type(), name, {"status": status}
        )
        return changed

    def delete(self, name: str = "policy") -> None:
        self.custom.delete_namespaced_custom_object(*self._type(), name)

    def pod(self, name: str, role: str | None, app: str, **labels: str) -> PodRef:
        """Create a pod, as running as it gets without a kubelet."""
        roles = {LABEL_ROLE: role} if role else {}
        body = {
            "metadata": {"name": name, "labels": {"app": app, **roles, **labels}},
            "spec": {
                "serviceAccountName": "default",
                "containers": [{"name": "main", "image": "none.invalid/none"}],
            },
        }
        created = self.core.create_namespaced_pod(self.namespace, body)
        status = {"status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}]}}
        self.core.patch_namespaced_pod_status(name, self.namespace, status)
        return PodRef(self.namespace, name, created.metadata.uid)

    def delete_pod(self, name: str) -> None:
        self.core.delete_namespaced_pod(name, self.namespace, grace_period_seconds=0)

    def token(
        self, pod: PodRef | None = None, audience: str = TOKEN_AUDIENCE, account: str = "default"
    ) -> str:
        """A ServiceAccount's token, bound to a pod if one is given; with audience "" for the API server."""
        spec: dict[str, Any] = {"expirationSeconds": 3600}
        if audience:
            spec["audiences"] = [audience]
        if pod is not None:
            spec["boundObjectRef"] = {"kind": "Pod", "apiVersion": "v1", "name": pod.name, "uid": pod.uid}
        answer = self.core.create_namespaced_service_account_token(account, self.namespace, {"spec": spec})
        token: str = answer.status.token
        return token

    def token_of(self, pod: PodRef) -> Callable[[], str]:
        """What an agent reads from its token file."""
        token = self.token(pod)
        return lambda: token

    def events(self) -> list[Any]:
        """The namespace's Events."""
        found: list[Any] = self.core.list_namespaced_event(self.namespace).items
        return found

    def conditions(self, name: str = "policy") -> dict[str, dict[str, Any]]:
        """The conditions by type."""
        status = self.read(name).get("status", {})
        return {row["type"]: row for row in status.get("conditions", [])}

    def allow(self, account: str, rules: list[dict[str, Any]]) -> None:
        """Make a ServiceAccount that may do this in the namespace."""
        name = f"{account}-{uuid.uuid4().hex[:6]}"
        self.core.create_namespaced_service_account(self.namespace, {"metadata": {"name": account}})
        self.rbac.create_namespaced_role(self.namespace, {"metadata": {"name": name}, "rules": rules})
        self.rbac.create_namespaced_role_binding(
            self.namespace,
            {
                "metadata": {"name": name},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
                "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": self.namespace}],
            },
        )

    def _type(self) -> tuple[str, str, str, str]:
        return GROUP, API_VERSION, self.namespace, PLURAL
