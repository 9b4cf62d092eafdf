"""What ``GET /v1/weightsyncs/{namespace}/{name}`` answers: the live fleet, which status does not hold."""

from dataclasses import dataclass

from weightsync_contract.messages import Serving, Source, Transfer, VersionId


@dataclass(frozen=True, slots=True)
class MemberView:
    """One pod of the fleet as its agent last told it."""

    name: str
    uid: str
    role: str
    connected: bool
    ranks: int
    rank: int
    """First rank in the present epoch; -1 outside of it."""
    transfer: Transfer
    serving: Serving | None = None
    source: Source | None = None
    message: str = ""
    """Why it is not a healthy member, for people; empty when it is."""


@dataclass(frozen=True, slots=True)
class FleetView:
    """A WeightSync's fleet at one moment, with the reason of each condition."""

    namespace: str
    name: str
    term: int
    epoch: int
    world_size: int
    phase: str
    message: str
    target: VersionId | None = None
    current: VersionId | None = None
    members: tuple[MemberView, ...] = ()
