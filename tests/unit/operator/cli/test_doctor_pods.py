"""What the doctor says of a WeightSync's pods: a sound fleet, and each thing spoilt."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from doctor_facts import SOUND_FLEET, VLLM_ARGS, weightsync

from weightsync_contract.fleetview import FleetView, MemberView
from weightsync_contract.messages import Transfer
from weightsync_operator.cli.core.doctor.diagnosis import diagnose
from weightsync_operator.cli.core.doctor.facts import Facts, Got
from weightsync_operator.cli.core.doctor.findings import Level
from weightsync_operator.cli.core.doctor.pods import arguments, option, read_pod

Object = dict[str, Any]


def spoil(change: Callable[[Object], None], of: int = 1, **spec: Any) -> Facts:
    """The sound fleet after ``change`` to a pod: 0 is the trainer, 1 the server."""
    pods = copy.deepcopy(list(SOUND_FLEET.pods.items))
    change(pods[of])
    document = weightsync(**spec)
    return replace(SOUND_FLEET, pods=Got(tuple(pods)), weightsyncs=(document,), neighbours=(document,))


def told(facts: Facts) -> list[tuple[str, Level, str]]:
    found = diagnose(facts)
    assert all(each.do for each in found if each.level in (Level.PROBLEM, Level.WARNING))
    return [(each.check, each.level, each.message) for each in found if each.level is not Level.FINE]


def engine(pod: Object) -> Object:
    (container,) = pod["spec"]["containers"]
    return container


def agent(pod: Object) -> Object:
    (container,) = pod["spec"]["initContainers"]
    return container


def without(word: str) -> Callable[[Object], None]:
    def change(pod: Object) -> None:
        engine(pod)["args"] = [each for each in VLLM_ARGS if word not in each]

    return change


def test_a_sound_fleet_has_nothing_to_object_to() -> None:
    assert told(SOUND_FLEET) == []
    assert any("2 pods of policy can take part" in each.message for each in diagnose(SOUND_FLEET))


@pytest.mark.parametrize(
    ("change", "check", "level", "said"),
    [
        (lambda pod: pod["spec"].update(initContainers=[]), "agent", Level.PROBLEM, "it has no agent"),
        (
            lambda pod: pod["metadata"].update(annotations={"weightsync.dev/container": "proxy"}),
            "agent",
            Level.PROBLEM,
            "names none of its containers",
        ),
        (
            lambda pod: pod["metadata"]["labels"].pop("weightsync.dev/role"),
            "labels",
            Level.PROBLEM,
            "the operator does not see it",
        ),
        (
            lambda pod: pod["metadata"]["labels"].update({"weightsync.dev/role": "trainer"}),
            "labels",
            Level.PROBLEM,
            "selected as inference and labelled weightsync.dev/role=trainer",
        ),
        (
            lambda pod: engine(pod).update(securityContext={"runAsUser": 0}),
            "users",
            Level.PROBLEM,
            "the agent runs as user 65532 and vllm as 0",
        ),
        (
            lambda pod: pod["spec"].update(securityContext={}),
            "users",
            Level.WARNING,
            "the images say as which users agent and vllm run",
        ),
        (
            lambda pod: engine(pod).update(ports=[{"containerPort": 8081}]),
            "ports",
            Level.PROBLEM,
            "port 8081 is the agent's health port and of container vllm too",
        ),
        (without("--middleware"), "vllm", Level.PROBLEM, "without weightsync's middleware"),
        (without("--weight"), "vllm", Level.PROBLEM, "--weight-transfer-config is not given"),
        (lambda pod: engine(pod).update(env=[]), "vllm", Level.PROBLEM, "VLLM_SERVER_DEV_MODE is not 1"),
        (
            lambda pod: engine(pod)["args"].append("--tensor-parallel-size=2"),
            "shm",
            Level.WARNING,
            "vLLM's 2 workers share /dev/shm",
        ),
        (
            lambda pod: (
                engine(pod).update(volumeMounts=[{"name": "shm", "mountPath": "/dev/shm"}]),
                pod["spec"].update(volumes=[{"name": "shm", "emptyDir": {}}]),
            ),
            "shm",
            Level.WARNING,
            "its /dev/shm is on a disk",
        ),
        (
            lambda pod: pod["status"].update(
                containerStatuses=[
                    {"name": "vllm", "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "again"}}}
                ]
            ),
            "running",
            Level.PROBLEM,
            "container vllm: CrashLoopBackOff: again",
        ),
    ],
)
def test_each_thing_that_is_wrong_is_told(
    change: Callable[[Object], None], check: str, level: Level, said: str
) -> None:
    ((name, found, message),) = told(spoil(change))
    assert (name, found, said in message) == (check, level, True), message


def test_a_trainer_needs_no_engines_flags() -> None:
    assert told(spoil(lambda pod: engine(pod).update(args=[], env=[]), of=0)) == []


def test_another_engine_than_vllm_is_not_told_about_vllms_flags() -> None:
    assert told(spoil(lambda pod: engine(pod).update(image="r/other:1", args=[], command=["serve"]))) == []


def test_an_engine_behind_a_shell_is_read_too() -> None:
    line = (
        "exec vllm serve m --middleware weightsync_engine.guard.Guard "
        '--weight_transfer_config \'{"backend":"weightsync"}\''
    )

    def change(pod: Object) -> None:
        engine(pod).update(command=["sh", "-c"], args=[line])

    assert told(spoil(change)) == []


@pytest.mark.parametrize(
    ("change", "checks"),
    [
        (lambda pod: None, ["shm", "gpu"]),
        (
            lambda pod: [
                each.update(
                    volumeMounts=[{"name": "shm", "mountPath": "/dev/shm"}],
                    resources={"claims": [{"name": "gpu"}]},
                )
                for each in (engine(pod), agent(pod))
            ],
            [],
        ),
        (
            lambda pod: [
                each.update(
                    volumeMounts=[{"name": "shm", "mountPath": "/dev/shm"}],
                    resources={"claims": [{"name": name}]},
                )
                for each, name in ((engine(pod), "gpu"), (agent(pod), "another"))
            ],
            ["gpu"],
        ),
        (
            lambda pod: engine(pod).update(
                volumeMounts=[{"name": "shm", "mountPath": "/dev/shm"}],
                resources={"limits": {"nvidia.com/gpu": "1"}},
            ),
            ["shm", "gpu"],
        ),
    ],
)
def test_the_device_path_needs_one_gpu_and_one_shared_memory_in_both(
    change: Callable[[Object], None], checks: list[str]
) -> None:
    found = told(spoil(change, dataPlane={"type": "Sidecar", "staging": "Device"}))
    assert [check for check, _, _ in found] == checks
    assert all(level is Level.PROBLEM for _, level, _ in found)


def test_vllms_own_backend_is_not_told_to_be_ours() -> None:
    def change(pod: Object) -> None:
        engine(pod)["args"] = [*VLLM_ARGS[:2], '--weight-transfer-config={"backend":"nccl"}']

    assert [check for check, _, _ in told(spoil(change))] == ["vllm"]
    assert told(spoil(change, dataPlane={"type": "Engine"})) == []


def test_a_selector_that_matches_nothing() -> None:
    document = weightsync(trainer={"selector": {"matchLabels": {"app": "trainr"}}})
    facts = replace(SOUND_FLEET, weightsyncs=(document,), neighbours=(document,))
    ((check, level, message),) = [each for each in told(facts) if each[0] == "selectors"]
    assert (check, level) == ("selectors", Level.PROBLEM)
    assert message == "no pod of namespace team matches app=trainr"


def test_a_pod_that_both_selectors_match() -> None:
    document = weightsync(
        inference={"selector": {"matchExpressions": [{"key": "app", "operator": "Exists"}]}}
    )
    facts = replace(SOUND_FLEET, weightsyncs=(document,), neighbours=(document,))
    messages = [message for _, _, message in told(facts)]
    assert "both selectors of policy match it" in messages


def test_a_pod_that_another_weightsync_has_too() -> None:
    other = weightsync()
    other["metadata"]["name"] = "elder"
    facts = replace(SOUND_FLEET, neighbours=(*SOUND_FLEET.weightsyncs, other))
    ((_, level, message),) = told(facts)
    assert (level, message) == (
        Level.PROBLEM,
        "elder selects vllm-0 as well; the older of the two keeps them",
    )


def test_pods_that_have_ended_are_not_looked_at() -> None:
    def change(pod: Object) -> None:
        pod["spec"]["initContainers"] = []
        pod["status"]["phase"] = "Succeeded"

    assert told(spoil(change)) == []


def test_an_agent_without_a_session_is_told_of() -> None:
    members = (MemberView("vllm-0", "u", "inference", False, 1, 1, Transfer()),)
    view = FleetView("team", "policy", 1, 1, 1, "", "", members=members)
    ((check, level, message),) = told(replace(SOUND_FLEET, views={"policy": view}))
    assert (check, level, message) == ("agents", Level.PROBLEM, "its agent has no session with the operator")


def test_what_can_not_be_seen_is_said_and_no_problem() -> None:
    found = told(replace(SOUND_FLEET, pods=Got(denied="403"), views={}, no_view="no right"))
    assert {level for _, level, _ in found} == {Level.UNKNOWN}
    assert {check for check, _, _ in found} == {"selectors", "agents"}


def test_what_the_operator_has_said_is_repeated() -> None:
    document = weightsync()
    document["status"] = {
        "conditions": [
            {
                "type": "SourceAvailable",
                "status": "False",
                "reason": "NoPublisher",
                "message": "start a trainer",
            }
        ]
    }
    ((check, level, message),) = told(replace(SOUND_FLEET, weightsyncs=(document,)))
    assert (check, level, message) == ("conditions", Level.WARNING, "SourceAvailable is False: NoPublisher")


def test_options_are_read_in_both_forms_and_the_last_word_may_lack_its_value() -> None:
    words = arguments({"command": ["vllm"], "args": ["--a=1", "--b", "2", "--c"]})
    assert [option(words, name) for name in ("--a", "--b", "--c", "--d")] == ["1", "2", "", None]


def test_an_agent_that_is_an_ordinary_container_is_one() -> None:
    pod = copy.deepcopy(dict(SOUND_FLEET.pods.items[1]))
    pod["spec"] = {
        "containers": [
            {"name": "side", "command": ["python3", "-m", "weightsync_engine.agent"]},
            {"name": "vllm"},
        ]
    }
    read = read_pod(pod)
    assert read.agent is not None
    assert read.served is not None
    assert (read.agent["name"], read.served["name"]) == ("side", "vllm")
