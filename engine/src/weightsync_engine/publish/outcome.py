"""What became of a published version, read from how the fleet stands."""

from weightsync_contract.messages import Fleet, VersionId
from weightsync_contract.reasons import Outcome
from weightsync_engine.publish.protocol import PublishOutcome, Settled


def settled(version: VersionId, fleet: Fleet | None) -> Settled | None:
    """The outcome, or None while it is open."""
    if fleet is None:
        return None
    if fleet.current == version:
        return Settled(PublishOutcome.SERVING)
    if fleet.members == 0:
        return Settled(
            PublishOutcome.NO_MEMBERS, "NoMembers", "no inference pod is selected: the copy is kept"
        )
    if _newer(fleet.current, version):
        return Settled(PublishOutcome.SUPERSEDED, "", f"the fleet is at {fleet.current}")
    rollout = fleet.rollout
    if rollout is None:
        return None
    if rollout.version == version and rollout.outcome in (Outcome.FAILED, Outcome.ABORTED):
        return Settled(PublishOutcome.FAILED, rollout.reason.value, rollout.message)
    if rollout.version == version and rollout.outcome is Outcome.SUPERSEDED:
        return Settled(PublishOutcome.SUPERSEDED, rollout.reason.value, rollout.message)
    if _newer(rollout.version, version):
        return Settled(PublishOutcome.SUPERSEDED, "", f"{rollout.version} is being rolled out")
    return None


def _newer(other: VersionId | None, version: VersionId) -> bool:
    return other is not None and other.run == version.run and other.version > version.version
