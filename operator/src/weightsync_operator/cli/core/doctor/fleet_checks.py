"""Checks of one WeightSync: whom it selects, and whether each pod can take part."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from weightsync_contract.fleetview import FleetView
from weightsync_contract.names import HEALTH_PORT, LABEL_INJECT, LABEL_ROLE
from weightsync_contract.reasons import Role
from weightsync_operator.cli.core.doctor.facts import Document, Facts, labels, name_of
from weightsync_operator.cli.core.doctor.findings import Finding, fine, problem, unknown, warning
from weightsync_operator.cli.core.doctor.pods import (
    Pod,
    alive,
    arguments,
    claims,
    environment,
    gpus,
    mount_at,
    option,
    options,
    read_pod,
    statuses,
    user_of,
    volume,
)
from weightsync_operator.core.model import Selector
from weightsync_operator.core.spec import describe, matches, parse_spec

GUARD: Final = "weightsync_engine.guard.Guard"
_WAITING: Final = ("CrashLoopBackOff", "ImagePullBackOff", "ErrImagePull", "CreateContainerConfigError")


def check_selectors(facts: Facts, document: Document) -> Iterator[Finding]:
    """A selector that matches nothing is most often a typo."""
    if facts.pods.denied:
        yield unknown("selectors", name_of(document), f"pods can't be listed: {facts.pods.denied}")
        return
    spec = parse_spec(document["spec"])
    for role, selector in ((Role.TRAINER, spec.trainer), (Role.INFERENCE, spec.inference)):
        yield from _selected(facts, document, role, selector)
    for pod in facts.pods.items:
        if matches(spec.trainer, labels(pod)) and matches(spec.inference, labels(pod)):
            yield problem(
                "selectors",
                f"pod {name_of(pod)}",
                f"both selectors of {name_of(document)} match it",
                "give trainer and inference pods different labels and select each by its own",
            )
    for other in facts.neighbours:
        if name_of(other) != name_of(document):
            yield from _shared(facts, document, other)


def check_pods(facts: Facts, document: Document) -> Iterator[Finding]:
    """Everything about each pod that can be read off it."""
    spec = parse_spec(document["spec"])
    plane = document["spec"].get("dataPlane") or {}
    engine_plane, device = plane.get("type") == "Engine", plane.get("staging") == "Device"
    good = 0
    for raw in facts.pods.items:
        role = _role(spec.trainer, spec.inference, raw)
        if role is None or not alive(raw):
            continue
        pod = read_pod(raw)
        found = [*_agent(pod), *_running(pod)]
        if pod.agent is not None and pod.served is not None:
            found += [*_users(pod, pod.agent, pod.served), *_ports(pod, pod.agent)]
            if role is Role.INFERENCE:
                found += [*_vllm(pod, pod.served, engine_plane), *_shared_memory(pod, pod.served, device)]
                found += _gpu_claim(pod, pod.agent, pod.served) if device else ()
        good += not found
        yield from found
    if good:
        yield fine("pods", f"{good} pod{'s' if good > 1 else ''} of {name_of(document)} can take part")


def check_live(facts: Facts, document: Document) -> Iterator[Finding]:
    """What the operator says of each agent."""
    view: FleetView | None = facts.views.get(name_of(document))
    if view is None:
        yield unknown("agents", name_of(document), f"the live fleet can't be had: {facts.no_view}")
        return
    away = [member.name for member in view.members if not member.connected]
    for name in away:
        yield problem(
            "agents",
            f"pod {name}",
            "its agent has no session with the operator",
            f"kubectl -n {facts.namespace} logs {name} -c weightsync-agent: it says whom it dials and what is refused",
        )
    if view.members and not away:
        yield fine("agents", f"all {len(view.members)} agents of {name_of(document)} are connected")


def check_conditions(document: Document) -> Iterator[Finding]:
    """What the operator has said already."""
    status = document.get("status") or {}
    rows = {row["type"]: row for row in status.get("conditions") or ()}
    if not rows:
        yield problem(
            "conditions",
            name_of(document),
            "no operator has looked at it",
            "does the operator run, and look after this namespace (watchNamespace)?",
        )
    for kind, row in rows.items():
        if row["status"] == "False" and kind != "Progressing":
            yield warning(
                "conditions", name_of(document), f"{kind} is False: {row['reason']}", row.get("message", "")
            )


# ---------------------------------------------------------------------------- selectors


def _selected(facts: Facts, document: Document, role: Role, selector: Selector) -> Iterator[Finding]:
    matching = [pod for pod in facts.pods.items if matches(selector, labels(pod))]
    subject = f"{name_of(document)} spec.{role}.selector"
    if not matching:
        level = problem if role is Role.TRAINER else warning
        yield level(
            "selectors",
            subject,
            f"no pod of namespace {facts.namespace} matches {describe(selector)}",
            f"compare with: kubectl -n {facts.namespace} get pods --show-labels",
        )
    for pod in matching:
        label = labels(pod).get(LABEL_ROLE)
        if label is None:
            yield problem(
                "labels",
                f"pod {name_of(pod)}",
                f"it is selected and has no label {LABEL_ROLE}: the operator does not see it",
                f"label its template {LABEL_ROLE}={role} (and {LABEL_INJECT}=true, for an agent)",
            )
        elif label != role:
            yield problem(
                "labels",
                f"pod {name_of(pod)}",
                f"it is selected as {role} and labelled {LABEL_ROLE}={label}",
                f"label its template {LABEL_ROLE}={role}, or change the selector",
            )


def _shared(facts: Facts, document: Document, other: Document) -> Iterator[Finding]:
    mine, theirs = parse_spec(document["spec"]), parse_spec(other["spec"])
    both = [
        name_of(pod)
        for pod in facts.pods.items
        if matches(mine.inference, labels(pod)) and matches(theirs.inference, labels(pod))
    ]
    if both:
        yield problem(
            "selectors",
            name_of(document),
            f"{name_of(other)} selects {', '.join(both[:3])} as well; the older of the two keeps them",
            "change one of the selectors",
        )


def _role(trainer: Selector, inference: Selector, pod: Document) -> Role | None:
    if matches(trainer, labels(pod)):
        return Role.TRAINER
    return Role.INFERENCE if matches(inference, labels(pod)) else None


# ---------------------------------------------------------------------------- a pod


def _agent(pod: Pod) -> Iterator[Finding]:
    if pod.agent is None:
        asked = labels(pod.document).get(LABEL_INJECT) == "true"
        do = (
            "it was made before the injection was there: delete it, its owner makes it anew"
            if asked
            else f"label its template {LABEL_INJECT}=true, or put the agent there: examples/on-a-cluster/sidecar"
        )
        yield problem("agent", f"pod {pod.name}", "it has no agent", do)
    elif pod.served is None:
        yield problem(
            "agent",
            f"pod {pod.name}",
            "the annotation weightsync.dev/container names none of its containers",
            "name the container that the agent is for",
        )


def _running(pod: Pod) -> Iterator[Finding]:
    for status in statuses(pod):
        waiting: Mapping[str, Any] = (status.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") in _WAITING:
            yield problem(
                "running",
                f"pod {pod.name}",
                f"container {status['name']}: {waiting['reason']}: {waiting.get('message', '')}".rstrip(": "),
                f"kubectl logs {pod.name} -c {status['name']} --previous; kubectl describe pod {pod.name}",
            )


def _users(pod: Pod, agent: Document, served: Document) -> Iterator[Finding]:
    one, other = user_of(pod, agent), user_of(pod, served)
    if one == other and one is not None:
        return
    do = "set runAsUser in the pod's securityContext, where it holds for both, and in no container's"
    if one is not None and other is not None:
        message = f"the agent runs as user {one} and {served['name']} as {other}: they can't open each other's files"
        yield problem("users", f"pod {pod.name}", message, do)
    else:
        message = f"the images say as which users agent and {served['name']} run, and they have to be one"
        yield warning("users", f"pod {pod.name}", message, do)


def _ports(pod: Pod, agent: Document) -> Iterator[Finding]:
    port = int(environment(agent).get("WEIGHTSYNC_HEALTH_PORT") or HEALTH_PORT)
    for container in pod.document["spec"]["containers"]:
        taken = [each["containerPort"] for each in container.get("ports") or ()]
        if container is not agent and port in taken:
            yield problem(
                "ports",
                f"pod {pod.name}",
                f"port {port} is the agent's health port and of container {container['name']} too",
                "give the agent another one: agent.healthPort of the chart",
            )


def _vllm(pod: Pod, served: Document, engine_plane: bool) -> Iterator[Finding]:
    words = arguments(served)
    if not _is_vllm(served, words):
        return
    subject = f"pod {pod.name}"
    if not any(GUARD in value for value in options(words, "--middleware")):
        yield problem(
            "vllm",
            subject,
            "vLLM runs without weightsync's middleware: it would answer with weights that nobody allowed",
            f"add --middleware {GUARD}",
        )
    if engine_plane:
        return
    given = option(words, "--weight-transfer-config")
    if _backend(given) != "weightsync":
        seen = "is not given" if given is None else f"is {given}"
        yield problem(
            "vllm",
            subject,
            f"--weight-transfer-config {seen}",
            """add --weight-transfer-config '{"backend":"weightsync"}'""",
        )
    variables = environment(served)
    if "VLLM_SERVER_DEV_MODE" not in variables or variables["VLLM_SERVER_DEV_MODE"] == "0":
        yield problem(
            "vllm",
            subject,
            "VLLM_SERVER_DEV_MODE is not 1: vLLM has no routes for the agent to bring weights by",
            "set VLLM_SERVER_DEV_MODE=1; the middleware closes those routes to all others",
        )


def _is_vllm(served: Document, words: list[str]) -> bool:
    image = str(served.get("image", "")).rpartition("/")[2]
    return "vllm" in image or any(word == "vllm" or word.startswith("vllm.") for word in words)


def _backend(given: str | None) -> str:
    try:
        document = json.loads(given or "")
    except ValueError:
        return ""
    return str(document.get("backend", "")) if isinstance(document, dict) else ""


def _shared_memory(pod: Pod, served: Document, device: bool) -> Iterator[Finding]:
    mount = mount_at(served, "/dev/shm")  # noqa: S108
    size = option(arguments(served), "--tensor-parallel-size") or option(arguments(served), "-tp") or "1"
    if device:
        other = mount_at(pod.agent, "/dev/shm") if pod.agent is not None else None  # noqa: S108
        if mount is None or other is None or mount["name"] != other["name"]:
            yield problem(
                "shm",
                f"pod {pod.name}",
                "staging Device hands memory over by CUDA IPC, which needs one /dev/shm for engine and agent",
                "name the pod's claim in the annotation weightsync.dev/claim: the agent gets /dev/shm along with it",
            )
    elif mount is None and size != "1":
        yield warning(
            "shm",
            f"pod {pod.name}",
            f"vLLM's {size} workers share /dev/shm, which is 64 MiB in a container unless something is mounted there",
            "mount an emptyDir (medium: Memory) at /dev/shm",
        )
    elif mount is not None and _on_disk(volume(pod, mount["name"])):
        yield warning(
            "shm", f"pod {pod.name}", "its /dev/shm is on a disk", "set the emptyDir's medium: Memory"
        )


def _on_disk(found: Document) -> bool:
    return "emptyDir" in found and found["emptyDir"].get("medium") != "Memory"


def _gpu_claim(pod: Pod, agent: Document, served: Document) -> Iterator[Finding]:
    if claims(agent) & claims(served):
        return
    plugin = " (a GPU of the device plugin, as nvidia.com/gpu is, is one container's)" if gpus(served) else ""
    yield problem(
        "gpu",
        f"pod {pod.name}",
        f"staging Device needs agent and {served['name']} to see the same GPU, and no claim is in both{plugin}",
        "take the GPU by a ResourceClaimTemplate, and name the claim in the annotation weightsync.dev/claim: the agent "
        "gets it, too. Or staging: Host",
    )
