"""What to do about the operator's own authority, decided from what is stored, what is published and the time.

A rotation never breaks a dial, because no step is taken before those who need the last one have it:

1. The next authority is made and stored. It signs nothing; it is added to the bundle that agents trust.
2. Once every namespace has that bundle, the time is stored. Then the kubelets need theirs: ``grace``.
3. The next authority becomes the current one and signs. The old one's key is gone, its certificate stays
   trusted.
4. When nothing that it signed can be valid, the old one leaves the bundle.

Each step is stored before it has any effect, so another leader goes on from where the last one was.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from weightsync_operator.pki.times import PkiTimes

_RENEW_AT: Final = 2 / 3


@dataclass(frozen=True, slots=True)
class Ca:
    """An authority. ``key`` is empty for one that is only trusted; both are PEM."""

    certificate: str
    key: str = field(repr=False)
    made_at: datetime
    expires_at: datetime

    def at(self, part: float) -> datetime:
        """When ``part`` of its life is over."""
        return self.made_at + part * (self.expires_at - self.made_at)


@dataclass(frozen=True, slots=True)
class Authorities:
    """What the Secret says. At most one of ``next`` and ``old`` is there."""

    current: Ca
    """Signs serving certificates."""
    next: Ca | None = None
    """Is to sign them; trusted already."""
    bundled_at: datetime | None = None
    """Since when every namespace trusts ``next``."""
    old: Ca | None = None
    """Signed them once; trusted still."""
    retired_at: datetime | None = None
    """Since when ``old`` signs no more."""

    @property
    def bundle(self) -> str:
        """The certificates that agents are to trust, newest first: becoming current changes nothing in it."""
        return "".join(each.certificate for each in (self.next, self.current, self.old) if each)


@dataclass(frozen=True, slots=True)
class Missing:
    """There is no Secret."""


@dataclass(frozen=True, slots=True)
class NotOurs:
    """There is a Secret of that name that this operator did not make."""


@dataclass(frozen=True, slots=True)
class Broken:
    """There is a Secret of ours that nothing can be signed with."""

    why: str


Seen = Authorities | Missing | NotOurs | Broken


class Bundle(StrEnum):
    """A namespace's ConfigMap, compared with the bundle that is wanted."""

    RIGHT = "right"
    WRONG = "wrong"
    """Missing, or ours with another text."""
    NOT_OURS = "not ours"
    UNKNOWN = "unknown"
    """It could not be read now."""


class Step(StrEnum):
    """Why the Secret is written."""

    CREATE = "made an authority: there was none"
    REPLACE = "replaced the authority"
    PREPARE = "made the next authority: agents are to trust it before it signs"
    BUNDLED = (
        "every namespace trusts the next authority: it signs once the kubelets have brought that into pods"
    )
    AGAIN = "a namespace does not trust the next authority any more: waiting once more"
    PROMOTE = "the next authority signs now"
    PROMOTE_LATE = (
        "the next authority signs now, though not every namespace trusts it: the last one ends soon"
    )
    DROP = "the last authority is trusted no more: nothing that it signed can be valid"


@dataclass(frozen=True, slots=True)
class Decision:
    """``store`` first, if there is one, and decide again; else give the bundle to the namespaces in ``publish``."""

    store: Authorities | None = None
    step: Step | None = None
    why: str = ""
    """More about ``step``, for REPLACE."""
    publish: tuple[str, ...] = ()
    not_ours: tuple[str, ...] = ()
    """Namespaces whose ConfigMap of that name is somebody else's and stays as it is."""


def decide(seen: Seen, bundles: Mapping[str, Bundle], now: datetime, times: PkiTimes, fresh: Ca) -> Decision:
    """What the leader has to do. ``bundles`` has each namespace with a WeightSync; ``fresh`` is a new authority."""
    match seen:
        case NotOurs():
            return Decision()
        case Missing():
            return Decision(Authorities(fresh), Step.CREATE)
        case Broken(why):
            return Decision(Authorities(fresh), Step.REPLACE, why)
    return (
        _end_of_current(seen, now, fresh)
        or _beginning(seen, now, fresh)
        or _waiting(seen, bundles, now, times)
        or _old(seen, now, times)
        or Decision(
            publish=tuple(name for name, state in bundles.items() if state is Bundle.WRONG),
            not_ours=tuple(name for name, state in bundles.items() if state is Bundle.NOT_OURS),
        )
    )


def _end_of_current(stored: Authorities, now: datetime, fresh: Ca) -> Decision | None:
    if now < stored.current.expires_at:
        return None
    if stored.next is not None and now < stored.next.expires_at:
        return Decision(_promoted(stored, stored.next, now), Step.PROMOTE_LATE)
    return Decision(
        Authorities(fresh), Step.REPLACE, f"it ended at {stored.current.expires_at:%Y-%m-%dT%H:%M:%SZ}"
    )


def _beginning(stored: Authorities, now: datetime, fresh: Ca) -> Decision | None:
    if stored.next or stored.old or now < stored.current.at(_RENEW_AT):
        return None
    return Decision(replace(stored, next=fresh), Step.PREPARE)


def _waiting(
    stored: Authorities, bundles: Mapping[str, Bundle], now: datetime, times: PkiTimes
) -> Decision | None:
    if stored.next is None:
        return None
    trusted = not {Bundle.WRONG, Bundle.UNKNOWN} & set(bundles.values())
    if trusted and stored.bundled_at and now >= stored.bundled_at + timedelta(seconds=times.grace):
        return Decision(_promoted(stored, stored.next, now), Step.PROMOTE)
    # Half of the time that was left when the next one was made. A namespace that can't be given the bundle must
    # not take all others along when the current one ends.
    if now >= stored.next.made_at + (stored.current.expires_at - stored.next.made_at) / 2:
        return Decision(_promoted(stored, stored.next, now), Step.PROMOTE_LATE)
    if trusted and not stored.bundled_at:
        return Decision(replace(stored, bundled_at=now), Step.BUNDLED)
    if Bundle.WRONG in bundles.values() and stored.bundled_at:
        # Written again, it takes the kubelets as long as the first time.
        return Decision(replace(stored, bundled_at=None), Step.AGAIN)
    return None


def _old(stored: Authorities, now: datetime, times: PkiTimes) -> Decision | None:
    if stored.old is None:
        return None
    signed_until = (stored.retired_at or now) + timedelta(seconds=times.trusted_after)
    if now < min(signed_until, stored.old.expires_at):
        return None
    return Decision(replace(stored, old=None, retired_at=None), Step.DROP)


def _promoted(stored: Authorities, successor: Ca, now: datetime) -> Authorities:
    return Authorities(successor, old=replace(stored.current, key=""), retired_at=now)
