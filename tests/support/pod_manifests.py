"""What a user would apply, for tests in pods: a trainer, inference servers, a WeightSync.

They differ from examples/on-a-cluster in what makes them light: a tiny model, the reference engine unless vLLM is
asked for, and torch mounted from this machine.
"""

from pathlib import Path
from typing import Any

import pod_trainer
from chart_release import Object

from weightsync_demo.engines import VLLM_SETTINGS, reference_command, vllm_command

ENGINE_PORT = 8000
MODEL = "/model"
USER = 65532
LIMIT_RATE = "150KiB"
"""Some four seconds a version."""
ENGINES = {
    "reference": (reference_command, {"OMP_NUM_THREADS": "1"}),
    "vllm": (vllm_command, VLLM_SETTINGS),
}
"""Arguments of Python and environment, by the kind of engine."""
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}


def trainer(image: str, site: tuple[Path, str], limit_rate: str, node: str) -> list[Object]:
    """A StatefulSet of one, and its script. ``site``: a folder of this machine, and where the pod has it."""
    script = Path(pod_trainer.__file__).read_text()
    container = {
        "name": "trainer",
        "image": image,
        "command": ["python3", "/trainer/pod_trainer.py"],
        "readinessProbe": {"httpGet": {"path": "/", "port": pod_trainer.PORT}, "periodSeconds": 1},
        "securityContext": RESTRICTED,
        "volumeMounts": [
            {"name": "script", "mountPath": "/trainer", "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "site", "mountPath": site[1], "readOnly": True},
        ],
    }
    volumes = [
        {"name": "script", "configMap": {"name": "trainer"}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "site", "hostPath": {"path": str(site[0]), "type": "Directory"}},
    ]
    annotations = {"weightsync.dev/limit-rate": limit_rate}
    pod = _pod("trainer", "trainer", container, volumes, annotations)
    pod["spec"]["nodeSelector"] = {"kubernetes.io/hostname": node}
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "trainer"},
            "data": {"pod_trainer.py": script},
        },
        _stateful_set("trainer", 1, pod),
    ]


def engines(kind: str, image: str, site: tuple[Path, str], model: Path, replicas: int) -> list[Object]:
    """A StatefulSet of inference servers that begin with the checkpoint ``model`` of this machine."""
    command, settings = ENGINES[kind]
    probe = {"httpGet": {"path": "/health", "port": ENGINE_PORT}}
    container = {
        "name": "engine",
        "image": image,
        "command": ["python3", *command(MODEL, ENGINE_PORT, host="0.0.0.0")],
        "env": [{"name": name, "value": value} for name, value in settings.items()],
        "ports": [{"name": "http", "containerPort": ENGINE_PORT}],
        "startupProbe": {**probe, "periodSeconds": 1, "failureThreshold": 600},
        "readinessProbe": {**probe, "periodSeconds": 2, "timeoutSeconds": 5},
        "securityContext": RESTRICTED,
        "volumeMounts": [
            {"name": "model", "mountPath": MODEL, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "site", "mountPath": site[1], "readOnly": True},
        ],
    }
    volumes = [
        {"name": "model", "hostPath": {"path": str(model), "type": "Directory"}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "512Mi"}},
        {"name": "site", "hostPath": {"path": str(site[0]), "type": "Directory"}},
    ]
    pod = _pod("engine", "inference", container, volumes, {})
    pod["spec"]["topologySpreadConstraints"] = [
        {
            "topologyKey": "kubernetes.io/hostname",
            "maxSkew": 1,
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": {"app": "engine"}},
        }
    ]
    return [_stateful_set("engine", replicas, pod)]


def weightsync(name: str = "policy", **spec: Any) -> Object:
    """One for these pods; ``spec`` is laid over it, key by key."""
    return {
        "apiVersion": "weightsync.dev/v1alpha1",
        "kind": "WeightSync",
        "metadata": {"name": name},
        "spec": {
            "trainer": {"selector": {"matchLabels": {"app": "trainer"}}, "retainedVersions": 2},
            "inference": {
                "selector": {"matchLabels": {"app": "engine"}},
                "initialWeights": "Withhold",
                "inFlightRequests": "Keep",
            },
            "dataPlane": {"type": "Sidecar", "staging": "Host"},
            "strategy": {"maxUnavailable": "50%"},
            "timeouts": {
                "joinSeconds": 30,
                "transferSeconds": 60,
                "commitSeconds": 30,
                "progressSeconds": 300,
            },
            **spec,
        },
    }


def _pod(
    app: str, role: str, container: Object, volumes: list[Object], annotations: dict[str, str]
) -> Object:
    labels = {"app": app, "weightsync.dev/role": role, "weightsync.dev/inject": "true"}
    return {
        "metadata": {"labels": labels, "annotations": annotations},
        "spec": {
            "terminationGracePeriodSeconds": 5,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": volumes,
        },
    }


def _stateful_set(name: str, replicas: int, pod: Object) -> Object:
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "serviceName": name,
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": {"app": name}},
            "template": pod,
        },
    }
