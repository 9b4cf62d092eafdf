"""What happened in a simulation, and whether it may have."""

from dataclasses import dataclass, field

from weightsync_contract.messages import Desired, VersionId


class ViolationError(AssertionError):
    """Something happened that must never happen."""


@dataclass
class History:
    """Told of everything that counts; raises ViolationError the moment it is wrong."""

    published: dict[VersionId, str] = field(default_factory=dict)
    served: dict[tuple[str, str], list[VersionId]] = field(default_factory=dict)
    """By member and boot, what was answered from."""
    ranks: dict[tuple[str, int, str], dict[int, str]] = field(default_factory=dict)
    """By WeightSync, epoch and nonce: which pod is which rank."""
    sizes: dict[tuple[str, int, str], int] = field(default_factory=dict)
    nonces: dict[tuple[str, int], str] = field(default_factory=dict)
    """By WeightSync and epoch that members were told of: its only nonce."""
    terms: dict[str, int] = field(default_factory=dict)
    writes: int = 0
    may_return: set[VersionId] = field(default_factory=set)
    """Versions that spec or action asked to go back to."""
    log: list[str] = field(default_factory=list)

    def note(self, at: float, text: str) -> None:
        """One line for whoever reads a failure."""
        self.log.append(f"{at - 1000:9.3f} {text}")

    @staticmethod
    def violation(text: str) -> ViolationError:
        """For what others see that must never be."""
        return ViolationError(text)

    def publish(self, version: VersionId, digest: str) -> None:
        self.published[version] = digest

    def answers(
        self,
        member: str,
        boot: str,
        weights: tuple[VersionId, str] | None,
        mixed: bool,
        named: VersionId | None,
    ) -> None:
        """An engine answers requests now, from these weights, with a permit that names a version."""
        if mixed:
            raise ViolationError(f"{member} ({boot}) answers from mixed weights")
        if weights is None:
            raise ViolationError(f"{member} ({boot}) answers from the weights that it started with")
        version, digest = weights
        if named != version:
            raise ViolationError(f"{member} ({boot}) answers from {version}, its permit names {named}")
        if self.published.get(version) != digest:
            raise ViolationError(f"{member} ({boot}) answers from {version} with bytes that nobody published")
        before = self.served.setdefault((member, boot), [])
        back = bool(before) and before[-1].run == version.run and before[-1].version > version.version
        if back and version not in self.may_return:
            raise ViolationError(f"{member} ({boot}) went back from {before[-1]} to {version}")
        if not before or before[-1] != version:
            before.append(version)

    def told(self, pod: str, desired: Desired) -> None:
        """The operator said this to an agent."""
        group, uid = desired.group, desired.weightsync.uid
        if group is None:
            return
        key = (uid, group.epoch, group.nonce)
        ranks = self.ranks.setdefault(key, {})
        if ranks.setdefault(group.rank, pod) != pod:
            raise ViolationError(f"epoch {group.epoch}: rank {group.rank} is {ranks[group.rank]} and {pod}")
        if self.sizes.setdefault(key, group.world_size) != group.world_size:
            raise ViolationError(f"epoch {group.epoch} has two sizes")
        if not 0 <= group.rank < group.world_size:
            raise ViolationError(f"epoch {group.epoch}: rank {group.rank} of {group.world_size}")
        if group.endpoint:
            nonce = self.nonces.setdefault((uid, group.epoch), group.nonce)
            if nonce != group.nonce:
                raise ViolationError(f"epoch {group.epoch} was handed out twice")

    def took(self, pod: str, incarnation: str, term: int) -> None:
        """An agent obeys somebody of this term."""
        if term < self.terms.get(pod, 0):
            raise ViolationError(f"{pod} obeyed term {term} after term {self.terms[pod]}")
        self.terms[pod] = term

    def applies(self, member: str, version: VersionId, digest: str) -> None:
        """An engine is about to be given these bytes."""
        if self.published.get(version) != digest:
            raise ViolationError(f"{member} applies {version} with bytes that nobody published")
