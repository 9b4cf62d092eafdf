"""A fleet with which nothing is wrong, as the doctor collects it."""

from datetime import UTC, datetime
from typing import Any

from weightsync_contract.fleetview import FleetView, MemberView
from weightsync_contract.messages import Transfer
from weightsync_operator.cli.core.doctor.facts import Facts, Got

VLLM_ARGS = [
    "--model=/model",
    "--middleware=weightsync_engine.guard.Guard",
    '--weight-transfer-config={"backend":"weightsync"}',
]


def weightsync(**spec: Any) -> dict[str, Any]:
    rows = [{"type": "Ready", "status": "True", "reason": "Synced", "message": ""}]
    return {
        "metadata": {"namespace": "team", "name": "policy", "generation": 1},
        "spec": {
            "trainer": {"selector": {"matchLabels": {"app": "trainer"}}},
            "inference": {"selector": {"matchLabels": {"app": "vllm"}}},
            **spec,
        },
        "status": {"observedGeneration": 1, "conditions": rows},
    }


def pod(name: str, role: str, app: str, container: dict[str, Any]) -> dict[str, Any]:
    labels = {"app": app, "weightsync.dev/role": role, "weightsync.dev/inject": "true"}
    return {
        "metadata": {"namespace": "team", "name": name, "uid": name, "labels": labels},
        "spec": {
            "securityContext": {"runAsUser": 65532},
            "initContainers": [{"name": "weightsync-agent", "image": "weightsync/agent:0.1.0"}],
            "containers": [container],
        },
        "status": {"phase": "Running", "podIP": "10.0.0.5"},
    }


def server() -> dict[str, Any]:
    return {
        "name": "vllm",
        "image": "registry.example/vllm-openai:1",
        "args": list(VLLM_ARGS),
        "env": [{"name": "VLLM_SERVER_DEV_MODE", "value": "1"}],
        "ports": [{"containerPort": 8000}],
    }


def _view() -> FleetView:
    members = tuple(
        MemberView(name, name, role, True, 1, rank, Transfer())
        for rank, (name, role) in enumerate((("trainer-0", "trainer"), ("vllm-0", "inference")))
    )
    return FleetView("team", "policy", 1, 1, 2, "Complete", "", members=members)


SOUND_FLEET = Facts(
    namespace="team",
    now=datetime(2026, 1, 1, 12, 0, tzinfo=UTC),
    cli_version="0.1.0",
    server_version="v1.36.3",
    operator_namespace="system",
    operator_service="weightsync-operator",
    weightsyncs=(weightsync(),),
    neighbours=(weightsync(),),
    pods=Got(
        (
            pod("trainer-0", "trainer", "trainer", {"name": "trainer", "image": "t:1"}),
            pod("vllm-0", "inference", "vllm", server()),
        )
    ),
    crd=Got(
        (
            {
                "metadata": {"name": "weightsyncs.weightsync.dev"},
                "spec": {"versions": [{"name": "v1alpha1", "served": True}]},
            },
        )
    ),
    deployments=Got(),
    operator_pods=Got(
        (
            {
                "metadata": {
                    "namespace": "system",
                    "name": "weightsync-operator-0",
                    "labels": {"app.kubernetes.io/name": "weightsync-operator"},
                },
                "status": {"phase": "Running", "podIP": "10.0.1.9"},
            },
        )
    ),
    lease=Got(
        (
            {
                "metadata": {"name": "weightsync-operator"},
                "spec": {"holderIdentity": "a", "renewTime": "2026-01-01T11:59:58Z"},
            },
        )
    ),
    bundle=Got(
        (
            {
                "metadata": {"name": "weightsync-ca", "labels": {"weightsync.dev/ca-of": "system"}},
                "data": {"ca.crt": "PEM"},
            },
        )
    ),
    mutating=Got(({"metadata": {"name": "weightsync-operator-inject"}},)),
    policies=Got(),
    operator_policies=Got(),
    views={"policy": _view()},
)
