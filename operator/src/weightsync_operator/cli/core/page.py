"""A WeightSync and its fleet as people read it: from its status, its pods and, if it can be had, the live fleet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from weightsync_contract.fleetview import FleetView, MemberView
from weightsync_contract.messages import ServingState, TransferState, VersionId
from weightsync_contract.reasons import Condition, Role

Document = Mapping[str, Any]

_MOVING = (TransferState.RECEIVING, TransferState.SENDING)


class Tone(StrEnum):
    """How it looks."""

    GOOD = "good"
    BUSY = "busy"
    BAD = "bad"
    QUIET = "quiet"


@dataclass(frozen=True, slots=True)
class ConditionRow:
    """A condition as the status has it."""

    type: str
    status: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class MemberRow:
    """A pod of the fleet. Unknown: rank -1, empty texts, 0 bytes, age -1 (seconds)."""

    name: str
    role: str
    rank: int
    ranks: int
    version: str
    phase: str
    bytes: int
    total_bytes: int
    age: int
    why: str
    tone: Tone


@dataclass(frozen=True, slots=True)
class Page:
    """Everything that ``status`` shows. ``live`` is false where the rows are from status and pods alone."""

    namespace: str
    name: str
    generation: int
    ready: str
    reason: str
    message: str
    phase: str
    target: str
    current: str
    outcome: str
    synced: str
    epoch: int
    world_size: int
    paused: bool
    source: str
    conditions: tuple[ConditionRow, ...]
    members: tuple[MemberRow, ...]
    live: bool
    hint: str = ""


def make_page(
    document: Document,
    view: FleetView | None,
    pods: Sequence[Document] | None,
    now: datetime,
    hint: str = "",
) -> Page:
    """``pods``: those that the WeightSync selects; None if they may not be listed. ``hint``: why there is no view."""
    metadata, spec, status = document["metadata"], document["spec"], document.get("status") or {}
    rows = conditions(document)
    ready = rows.get(Condition.READY)
    progressing = rows.get(Condition.PROGRESSING)
    group, source = status.get("group") or {}, status.get("source") or {}
    ages = {pod["metadata"]["uid"]: _age(pod, now) for pod in pods or ()}
    if view is not None:
        members = tuple(_live_row(member, ages.get(member.uid, -1), view.target) for member in view.members)
    else:
        members = tuple(_still_rows(group, pods, ages))
    return Page(
        namespace=metadata["namespace"],
        name=metadata["name"],
        generation=metadata.get("generation", 0),
        ready=ready.status if ready else "Unknown",
        reason=ready.reason if ready else "NotSeenYet",
        message=ready.message if ready else "no operator has looked at this WeightSync yet",
        phase=(view.phase if view else "") or (progressing.reason if progressing else ""),
        target=_version(view.target) if view else _version_of(status.get("rollout")),
        current=_version(view.current) if view else _version_of(status.get("current")),
        outcome=(status.get("rollout") or {}).get("outcome", ""),
        synced=status.get("synced", ""),
        epoch=view.epoch if view else group.get("epoch", 0),
        world_size=view.world_size if view else group.get("worldSize", 0),
        paused=bool(spec.get("paused")),
        source=source.get("pod", ""),
        conditions=tuple(rows.values()),
        members=members,
        live=view is not None,
        hint=hint,
    )


def conditions(document: Document) -> dict[str, ConditionRow]:
    """The conditions by type, in the order of the status."""
    rows = (document.get("status") or {}).get("conditions") or ()
    return {
        row["type"]: ConditionRow(row["type"], row["status"], row["reason"], row.get("message", ""))
        for row in rows
    }


def brief_bytes(nbytes: int) -> str:
    """Bytes for people: ``380 MiB``, ``1.5 GiB``."""
    if nbytes >= 10 << 30:
        return f"{nbytes / 2**30:.0f} GiB"
    if nbytes >= 1 << 30:
        return f"{nbytes / 2**30:.1f} GiB"
    return f"{nbytes / 2**20:.0f} MiB" if nbytes >= 1 << 20 else f"{nbytes / 2**10:.0f} KiB"


def brief_age(seconds: int) -> str:
    """Seconds for people: ``45s``, ``12m``, ``5h``, ``3d``; empty if unknown."""
    if seconds < 0:
        return ""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _live_row(member: MemberView, age: int, target: VersionId | None) -> MemberRow:
    transfer = member.transfer
    moving = transfer.state in _MOVING
    return MemberRow(
        name=member.name,
        role=member.role,
        rank=member.rank,
        ranks=member.ranks,
        version=_serves(member),
        phase=_phase(member),
        bytes=transfer.bytes,
        total_bytes=transfer.total_bytes,
        age=age,
        why=member.message or (transfer.failure.message if transfer.failure else ""),
        tone=_tone(member, moving, target),
    )


def _serves(member: MemberView) -> str:
    if member.source is not None and member.source.versions:
        return _version(member.source.versions[-1].version)
    if member.serving is None or member.serving.state is not ServingState.SERVING:
        return ""
    return _version(member.serving.version)


def _phase(member: MemberView) -> str:
    """What it does with the group while that is anything, else how its engine is."""
    if not member.connected:
        return "NotConnected"
    serving = member.serving
    if serving is not None and serving.state in (ServingState.FENCED, ServingState.APPLYING):
        return serving.state
    quiet = (TransferState.IDLE, TransferState.JOINED, TransferState.SENT)
    if member.transfer.state not in quiet:
        return member.transfer.state
    if serving is not None:
        return serving.state
    return "Publishing" if member.source is not None and member.source.connected else member.transfer.state


def _tone(member: MemberView, moving: bool, target: VersionId | None) -> Tone:
    serving = member.serving
    if not member.connected or (
        serving is not None and serving.state in (ServingState.FENCED, "Unreachable")
    ):
        return Tone.BAD
    if moving or (serving is not None and serving.state is ServingState.APPLYING):
        return Tone.BUSY
    if member.role == Role.TRAINER:
        return Tone.QUIET
    serves = serving is not None and serving.state is ServingState.SERVING
    return Tone.GOOD if serves and serving is not None and target in (None, serving.version) else Tone.QUIET


def _still_rows(group: Document, pods: Sequence[Document] | None, ages: Mapping[str, int]) -> list[MemberRow]:
    """Rows of what status and pods say: ranks of the newest epoch, and whether the pod is Ready."""
    places: dict[str, tuple[int, int, str]] = {}
    for text in group.get("members") or ():
        rank, ranks, name, uid = text.split(":", 3)
        places[uid] = (int(rank), int(ranks), name)
    if pods is None:
        return [_still_row(name, "", rank, ranks, "", -1) for rank, ranks, name in places.values()]
    rows = []
    for pod in pods:
        metadata = pod["metadata"]
        rank, ranks, _ = places.get(metadata["uid"], (-1, 0, ""))
        role = (metadata.get("labels") or {}).get("weightsync.dev/role", "")
        rows.append(_still_row(metadata["name"], role, rank, ranks, pod_phase(pod), ages[metadata["uid"]]))
    return rows


def _still_row(name: str, role: str, rank: int, ranks: int, phase: str, age: int) -> MemberRow:
    tone = Tone.GOOD if phase == "Ready" else Tone.QUIET
    return MemberRow(name, role, rank, ranks, "", phase, 0, 0, age, "", tone)


def pod_phase(pod: Document) -> str:
    """``Ready``, or what kubectl would say of it."""
    status = pod.get("status") or {}
    if pod["metadata"].get("deletionTimestamp"):
        return "Terminating"
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions") or ())
    return "Ready" if ready else str(status.get("phase", "Unknown"))


def _version(version: VersionId | None) -> str:
    return str(version) if version else ""


def _version_of(status: Document | None) -> str:
    return f"{status['run']}/{status['version']}" if status else ""


def _age(pod: Document, now: datetime) -> int:
    created = pod["metadata"].get("creationTimestamp")
    if not created:
        return -1
    return max(0, int((now - datetime.fromisoformat(created.replace("Z", "+00:00"))).total_seconds()))
