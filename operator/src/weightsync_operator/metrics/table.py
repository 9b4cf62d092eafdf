"""Every metric by name, kind, labels and meaning: the one place; docs/metrics.md is made of it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Kind(StrEnum):
    """Prometheus' types."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """``leader``: told by the replica that leads alone, so that a sum over replicas counts nothing twice."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    leader: bool = True


FLEET: Final = ("namespace", "weightsync")
POD: Final = (*FLEET, "pod")

INFO: Final = Metric(
    "weightsync_info", Kind.GAUGE, "1; the label says which release runs", ("version",), False
)
LEADER: Final = Metric(
    "weightsync_leader", Kind.GAUGE, "1 on the replica that leads, 0 on the others", (), False
)
SESSIONS: Final = Metric("weightsync_sessions", Kind.GAUGE, "agents that are connected")
QUEUE_DEPTH: Final = Metric("weightsync_queue_depth", Kind.GAUGE, "WeightSyncs that wait to be looked at")
RECONCILES: Final = Metric(
    "weightsync_reconcile_total", Kind.COUNTER, "passes over a WeightSync; result is ok or error", ("result",)
)
RECONCILE_SECONDS: Final = Metric(
    "weightsync_reconcile_duration_seconds",
    Kind.HISTOGRAM,
    "how long a pass took, its write of the status included",
)
WATCH_FAILURES: Final = Metric(
    "weightsync_watch_failures_total", Kind.COUNTER, "watches that ended and were begun anew", (), False
)
LIST_FAILURES: Final = Metric(
    "weightsync_list_failures_total", Kind.COUNTER, "lists of WeightSyncs and pods that failed", (), False
)
CONDITION: Final = Metric(
    "weightsync_condition",
    Kind.GAUGE,
    "1 for each condition of the status, with its status and its reason as kubectl shows them",
    (*FLEET, "condition", "status", "reason"),
)
PHASE_SECONDS: Final = Metric(
    "weightsync_phase_duration_seconds",
    Kind.HISTOGRAM,
    "how long a phase lasted (Grouping, Checking, Transferring, Committing), rollouts and catch-ups alike",
    ("phase",),
)
ROLLOUTS: Final = Metric(
    "weightsync_rollouts_total",
    Kind.COUNTER,
    "rollouts that ended; outcome is Succeeded, Failed, Superseded or Aborted",
    (*FLEET, "outcome"),
)
ROLLOUT_SECONDS: Final = Metric(
    "weightsync_rollout_duration_seconds",
    Kind.HISTOGRAM,
    "how long a rollout took that ended so",
    ("outcome",),
)
RECEIVED_BYTES: Final = Metric(
    "weightsync_received_bytes_total", Kind.COUNTER, "bytes of weights that members have received", FLEET
)
MEMBERS: Final = Metric(
    "weightsync_members",
    Kind.GAUGE,
    "members by how their engine is; state is a ServingState, or NotConnected where no agent tells",
    (*FLEET, "state"),
)
MEMBERS_SYNCED: Final = Metric(
    "weightsync_members_synced", Kind.GAUGE, "members that serve the target", FLEET
)
MEMBERS_STALLED: Final = Metric(
    "weightsync_members_stalled",
    Kind.GAUGE,
    "members that receive, and have had no byte for 5 seconds or more",
    FLEET,
)
EPOCH: Final = Metric(
    "weightsync_epoch", Kind.GAUGE, "the newest membership of the group; grows with each change", FLEET
)
TARGET_VERSION: Final = Metric(
    "weightsync_target_version", Kind.GAUGE, "version that the fleet is brought to", (*FLEET, "run")
)
CURRENT_VERSION: Final = Metric(
    "weightsync_current_version", Kind.GAUGE, "version that the fleet was brought to", (*FLEET, "run")
)
CURRENT_TIME: Final = Metric(
    "weightsync_current_version_timestamp_seconds",
    Kind.GAUGE,
    "when the fleet got its version, Unix time",
    FLEET,
)
MEMBER_VERSION: Final = Metric(
    "weightsync_member_version",
    Kind.GAUGE,
    "version that a pod serves; none while it serves none",
    (*POD, "run"),
)
MEMBER_BYTES: Final = Metric(
    "weightsync_member_received_bytes",
    Kind.GAUGE,
    "bytes that a pod has of the version that it receives or has staged",
    POD,
)
MEMBER_TOTAL: Final = Metric(
    "weightsync_member_expected_bytes",
    Kind.GAUGE,
    "bytes of the version that a pod receives or has staged",
    POD,
)

METRICS: Final = (
    *(INFO, LEADER, SESSIONS, QUEUE_DEPTH, RECONCILES, RECONCILE_SECONDS, WATCH_FAILURES, LIST_FAILURES),
    *(CONDITION, MEMBERS, MEMBERS_SYNCED, MEMBERS_STALLED, EPOCH),
    *(TARGET_VERSION, CURRENT_VERSION, CURRENT_TIME),
    *(ROLLOUTS, ROLLOUT_SECONDS, PHASE_SECONDS, RECEIVED_BYTES),
    *(MEMBER_VERSION, MEMBER_BYTES, MEMBER_TOTAL),
)


def markdown() -> str:
    """The table of docs/metrics.md."""
    lines = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for each in METRICS:
        labels = ", ".join(each.labels)
        everywhere = "" if each.leader else " (each replica)"
        lines.append(f"| `{each.name}` | {each.kind} | {labels} | {each.help}{everywhere} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import sys

    sys.stdout.write(markdown())
