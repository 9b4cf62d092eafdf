"""Who is in the fleet, and where each member stands, apart from any version."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from weightsync_contract.messages import Capability, Serving, ServingState, Transfer, TransferState, VersionId
from weightsync_contract.reasons import Reason, Role
from weightsync_operator.core.limits import NAMES
from weightsync_operator.core.model import AgentView, PodView, VersionTarget, World
from weightsync_operator.core.spec import max_unavailable


class Standing(StrEnum):
    """Whether a member can take part in a round."""

    READY = "Ready"
    PENDING = "Pending"
    """It has not come up yet: no agent, or no engine that answers."""
    ABSENT = "Absent"
    """Its agent's session is gone. That says nothing about what it serves."""
    FENCED = "Fenced"
    INCAPABLE = "Incapable"


@dataclass(frozen=True, slots=True)
class Member:
    """A pod of the fleet with what its agent last told."""

    pod: PodView
    view: AgentView | None
    standing: Standing
    message: str = ""
    """Why it is not Ready, for people."""

    @property
    def uid(self) -> str:
        return self.pod.uid

    @property
    def name(self) -> str:
        return self.pod.name

    @property
    def connected(self) -> bool:
        return self.view is not None and self.view.connected

    @property
    def ranks(self) -> int:
        return self.view.observed.ranks if self.view and self.view.observed else 0

    @property
    def transfer(self) -> Transfer:
        return self.view.observed.transfer if self.view and self.view.observed else Transfer()

    @property
    def serving(self) -> Serving:
        serving = self.view.observed.serving if self.view and self.view.observed else None
        return serving or Serving()

    @property
    def incarnation(self) -> str:
        return self.view.hello.incarnation if self.view else ""

    def serves(self, version: VersionId) -> bool:
        """Whether it answers from this version."""
        return self.serving.state is ServingState.SERVING and self.serving.version == version

    def applies(self, version: VersionId) -> bool:
        """Whether it is just switching to this version."""
        return self.serving.state is ServingState.APPLYING and version in (
            self.transfer.version,
            self.serving.version,
        )

    def has(self, version: VersionId) -> bool:
        """Whether its engine holds this version, whether or not it may answer from it."""
        held = (ServingState.SERVING, ServingState.WITHHELD)
        return self.serving.state in held and self.serving.version == version

    def beyond(self, version: VersionId) -> bool:
        """Whether its engine holds a later version of the same run: it is never taken back."""
        held = self.serving.version
        clean = self.serving.state in (ServingState.SERVING, ServingState.WITHHELD)
        return clean and held is not None and held.run == version.run and held.version > version.version

    def holds(self, target: VersionTarget, verify: bool) -> bool:
        """Whether the version lies staged, and is what was published."""
        transfer = self.transfer
        # An agent that leaves its group keeps what is staged, and names a version only if it is.
        if transfer.state not in (TransferState.STAGED, TransferState.ABORTING):
            return False
        if transfer.version != target.version:
            return False
        return not verify or not target.digest or transfer.digest == target.digest


def fleet(world: World) -> dict[str, Member]:
    """Members by pod uid, in the order of their names."""
    trainers = {pod.uid for pod in world.trainers}
    pods = [
        pod
        for pod in sorted(world.members, key=lambda pod: (pod.name, pod.uid))
        if pod.uid not in trainers | world.claims.keys() and not pod.finished and not pod.terminating
    ]
    return {pod.uid: _member(pod, world.agents.get(pod.uid)) for pod in pods}


def _member(pod: PodView, view: AgentView | None) -> Member:
    if view is None:
        return Member(pod, view, Standing.PENDING, "no agent has connected: is the sidecar running?")
    if view.hello.role is not Role.INFERENCE:
        return Member(pod, view, Standing.INCAPABLE, "its agent runs with --role trainer")
    if not view.connected:
        return Member(pod, view, Standing.ABSENT, "its agent has lost its session")
    if view.observed is None:
        return Member(pod, view, Standing.PENDING, "its agent has not reported yet")
    serving = view.observed.serving or Serving()
    if serving.state is ServingState.FENCED:
        why = serving.failure.message if serving.failure else "its weights may be mixed"
        return Member(pod, view, Standing.FENCED, f"fenced: {why}")
    if view.observed.ranks < 1 or serving.state is ServingState.UNREACHABLE:
        return Member(pod, view, Standing.PENDING, "its engine does not answer")
    if Capability.STAGES not in view.observed.capabilities:
        message = "its engine can't take staged weights: start it with the weightsync plugin"
        return Member(pod, view, Standing.INCAPABLE, message)
    return Member(pod, view, Standing.READY)


def unguarded(member: Member) -> bool:
    """Whether the engine answers without a permit: nothing is promised of a member after a restart."""
    observed = member.view.observed if member.view else None
    return (
        member.standing is Standing.READY
        and observed is not None
        and (Capability.GUARDS not in observed.capabilities)
    )


def established(member: Member) -> bool:
    """Whether it served when last heard of, so that leaving it out loses something."""
    return member.serving.version is not None and member.serving.state in (
        ServingState.SERVING,
        ServingState.APPLYING,
    )


def absent_since(member: Member, world: World) -> float:
    """When its session went, or ours began if it has had none with us."""
    return max(member.view.changed_at, world.leading_since) if member.view else world.leading_since


def limit(world: World, members: Mapping[str, Member]) -> int:
    """How many members may be left out of a rollout."""
    return max_unavailable(world.spec.max_unavailable, len(members))


def names(members: Iterable[Member]) -> str:
    """The pods' names, the first few of them."""
    every = [member.name for member in members]
    more = len(every) - NAMES
    return ", ".join(every[:NAMES]) + (f" and {more} more" if more > 0 else "")


HEALTH_OF_STANDING = {
    Standing.PENDING: Reason.AGENT_MISSING,
    Standing.ABSENT: Reason.AGENT_MISSING,
    Standing.FENCED: Reason.FENCED,
    Standing.INCAPABLE: Reason.CAPABILITY_MISSING,
}
