"""Pods for the chart's policies, at a real API server."""

import copy
import json
import secrets
from typing import Any

from weightsync_contract.names import LABEL_INJECT, LABEL_ROLE
from weightsync_demo.kube.apiserver import ApiServer

Object = dict[str, Any]

POLICY_SECONDS = 30.0
"""An API server reads a new policy within a second or so of its making."""

RESTRICTED: Object = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def container(name: str, **more: Any) -> Object:
    return {"name": name, "image": "example.dev/any:1", "securityContext": RESTRICTED, **more}


def new_pod(
    namespace: str,
    *containers: Object,
    role: str = "inference",
    inject: str | None = "true",
    annotations: dict[str, str] | None = None,
    **spec: Any,
) -> Object:
    """A pod that asks for an agent, of the engine alone unless containers are given."""
    labels = (
        {"app": "vllm"} | ({LABEL_ROLE: role} if role else {}) | ({LABEL_INJECT: inject} if inject else {})
    )
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "engine-0",
            "namespace": namespace,
            "labels": labels,
            **({"annotations": annotations} if annotations else {}),
        },
        "spec": {
            # What the ServiceAccount plugin would set, which doesn't run without a controller-manager.
            "serviceAccountName": "default",
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": list(containers) or [container("engine")],
            **spec,
        },
    }


def make_namespace(cluster: ApiServer) -> str:
    name = f"test-{secrets.token_hex(4)}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    namespace = {"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": name, "labels": labels}}
    cluster.kubectl("create", "--filename=-", stdin=json.dumps(namespace))
    # The controller-manager's work.
    cluster.kubectl("create", "serviceaccount", "default", f"--namespace={name}")
    return name


def create(cluster: ApiServer, pod: Object, keep: bool = False) -> Object:
    """The pod as the API server takes it; KubectlError if it refuses. It is only kept if that is said."""
    dry = [] if keep else ["--dry-run=server"]
    made: Object = json.loads(
        cluster.kubectl(
            *("create", "--output=json", "--validate=strict", *dry, "--filename=-"), stdin=json.dumps(pod)
        )
    )
    return made


def without_agent(pod: Object) -> Object:
    """A pod's spec less what an agent brings; the rest is as it was before."""
    spec = copy.deepcopy(pod["spec"])
    spec["initContainers"] = [c for c in spec["initContainers"] if c["name"] != "weightsync-agent"]
    spec["volumes"] = [v for v in spec["volumes"] if not v["name"].startswith("weightsync-")]
    for each in spec["containers"]:
        for field, key in (("volumeMounts", "name"), ("env", "name")):
            each[field] = [x for x in each.get(field, []) if not x[key].lower().startswith("weightsync")]
    for holder in (spec, *spec["containers"]):
        for field in ("initContainers", "volumes", "volumeMounts", "env"):
            if holder.get(field) == []:
                del holder[field]
    return spec
