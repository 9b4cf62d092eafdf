"""The operator's own authority, step by step: what is decided from what is stored, published and the time."""

import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from weightsync_operator.pki.core import (
    Authorities,
    Broken,
    Bundle,
    Ca,
    Decision,
    Missing,
    NotOurs,
    Seen,
    Step,
    decide,
)
from weightsync_operator.pki.times import PkiTimes

TIMES = PkiTimes()
START = datetime(2026, 1, 1, tzinfo=UTC)
YEAR = timedelta(days=365)
GRACE = timedelta(seconds=TIMES.grace)
TRUSTED = timedelta(seconds=TIMES.trusted_after)
SECOND = timedelta(seconds=1)


def ca(name: str, made_at: datetime = START, life: timedelta = YEAR) -> Ca:
    return Ca(f"<{name}>", f"key of {name}", made_at, made_at + life)


A, B, FRESH = ca("a"), ca("b", START + YEAR * 2 / 3), ca("fresh")
BEGIN = START + YEAR * 2 / 3
WAITING = Authorities(A, next=B)
BUNDLED = replace(WAITING, bundled_at=BEGIN)
PROMOTED = Authorities(B, old=replace(A, key=""), retired_at=BEGIN + GRACE)


def decided(seen: Seen, now: datetime, **bundles: Bundle) -> Decision:
    return decide(seen, bundles, now, TIMES, FRESH)


@pytest.mark.parametrize(
    ("seen", "now", "bundles", "expected"),
    [
        pytest.param(Missing(), START, {}, Decision(Authorities(FRESH), Step.CREATE), id="none yet"),
        pytest.param(NotOurs(), START, {"n": Bundle.WRONG}, Decision(), id="somebody else's Secret"),
        pytest.param(
            Broken("no key"), START, {}, Decision(Authorities(FRESH), Step.REPLACE, "no key"), id="broken"
        ),
        pytest.param(Authorities(A), START, {"n": Bundle.RIGHT}, Decision(), id="nothing to do"),
        pytest.param(
            Authorities(A),
            START,
            {"m": Bundle.RIGHT, "n": Bundle.WRONG, "o": Bundle.NOT_OURS, "p": Bundle.UNKNOWN},
            Decision(publish=("n",), not_ours=("o",)),
            id="a namespace without the bundle",
        ),
        pytest.param(Authorities(A), BEGIN - SECOND, {}, Decision(), id="not two thirds yet"),
        pytest.param(
            Authorities(A), BEGIN, {}, Decision(Authorities(A, next=FRESH), Step.PREPARE), id="two thirds"
        ),
        pytest.param(
            WAITING,
            BEGIN,
            {"n": Bundle.WRONG},
            Decision(publish=("n",)),
            id="the next one is published first",
        ),
        pytest.param(WAITING, BEGIN, {"n": Bundle.UNKNOWN}, Decision(), id="nobody knows"),
        pytest.param(
            WAITING, BEGIN, {"n": Bundle.RIGHT}, Decision(BUNDLED, Step.BUNDLED), id="everywhere published"
        ),
        pytest.param(
            WAITING,
            BEGIN,
            {"n": Bundle.NOT_OURS},
            Decision(BUNDLED, Step.BUNDLED),
            id="somebody else's ConfigMap holds nothing up",
        ),
        pytest.param(BUNDLED, BEGIN + GRACE - SECOND, {"n": Bundle.RIGHT}, Decision(), id="in the grace"),
        pytest.param(
            BUNDLED,
            BEGIN + GRACE,
            {"n": Bundle.RIGHT},
            Decision(PROMOTED, Step.PROMOTE),
            id="after the grace",
        ),
        pytest.param(
            BUNDLED,
            BEGIN + GRACE,
            {"m": Bundle.RIGHT, "n": Bundle.WRONG},
            Decision(WAITING, Step.AGAIN),
            id="somebody deleted one in the grace",
        ),
        pytest.param(BUNDLED, BEGIN + GRACE, {"n": Bundle.UNKNOWN}, Decision(), id="unknown after the grace"),
        pytest.param(
            BUNDLED,
            BEGIN - timedelta(hours=1),
            {"n": Bundle.RIGHT},
            Decision(),
            id="the clock went back in the grace",
        ),
        pytest.param(
            WAITING,
            BEGIN + YEAR / 6 - SECOND,
            {"n": Bundle.WRONG},
            Decision(publish=("n",)),
            id="a namespace refuses it, early",
        ),
        pytest.param(
            WAITING,
            BEGIN + YEAR / 6,
            {"n": Bundle.WRONG},
            Decision(replace(PROMOTED, retired_at=BEGIN + YEAR / 6), Step.PROMOTE_LATE),
            id="a namespace refuses it, half of the rest is gone",
        ),
        pytest.param(
            Authorities(A, next=ca("late", START + YEAR - timedelta(hours=2))),
            START + YEAR - timedelta(hours=2),
            {"n": Bundle.WRONG},
            Decision(publish=("n",)),
            id="also a late beginning publishes first",
        ),
        pytest.param(
            Authorities(A),
            START + YEAR,
            {},
            Decision(Authorities(FRESH), Step.REPLACE, "it ended at 2027-01-01T00:00:00Z"),
            id="the operator was away until the end",
        ),
        pytest.param(
            WAITING,
            START + YEAR,
            {"n": Bundle.WRONG},
            Decision(replace(PROMOTED, retired_at=START + YEAR), Step.PROMOTE_LATE),
            id="ended, and there is a next one",
        ),
        pytest.param(
            PROMOTED,
            BEGIN + GRACE + TRUSTED - SECOND,
            {"n": Bundle.RIGHT},
            Decision(),
            id="something that the old one signed may be in use",
        ),
        pytest.param(
            PROMOTED,
            BEGIN + GRACE + TRUSTED,
            {"n": Bundle.WRONG},
            Decision(Authorities(B), Step.DROP),
            id="nothing that the old one signed is valid",
        ),
        pytest.param(
            replace(PROMOTED, retired_at=None), BEGIN + GRACE, {}, Decision(), id="nobody knows since when"
        ),
        pytest.param(
            replace(PROMOTED, retired_at=None),
            START + YEAR,
            {},
            Decision(Authorities(B), Step.DROP),
            id="the old one has ended itself",
        ),
    ],
)
def test_a_decision(seen: Seen, now: datetime, bundles: dict[str, Bundle], expected: Decision) -> None:
    assert decided(seen, now, **bundles) == expected


def test_becoming_current_changes_nothing_in_the_bundle() -> None:
    assert WAITING.bundle == PROMOTED.bundle


def test_a_retired_authority_keeps_no_key() -> None:
    stored = decided(BUNDLED, BEGIN + GRACE).store
    assert stored is not None
    assert stored.old is not None
    assert stored.old.key == ""


@pytest.mark.parametrize(
    ("check", "deleted_every"),
    [
        pytest.param(TIMES.check, 0, id="as it is"),
        pytest.param(3600.0, 0, id="rarely looked at"),
        pytest.param(3600.0, 7, id="a ConfigMap is deleted now and then"),
    ],
)
def test_no_dial_is_ever_refused_in_five_years(check: float, deleted_every: int) -> None:
    """A follower that reads late, and a kubelet that brings a bundle as late as it may.

    At every moment each agent trusts what each replica serves with, and that is valid.
    """
    times = replace(TIMES, check=check)
    now, numbers = START, itertools.count(1)
    stored: Seen = Missing()
    published = ""
    mounted: list[tuple[datetime, str]] = []
    follower: tuple[Ca, datetime] | None = None
    steps = []
    skip = timedelta(seconds=check)
    while now < START + 5 * YEAR:
        for _ in range(8):
            wanted = stored.bundle if isinstance(stored, Authorities) else ""
            state = Bundle.RIGHT if published == wanted else Bundle.WRONG
            made = decide(stored, {"n": state}, now, times, ca(f"{next(numbers)}", now))
            if made.store:
                stored, _ = made.store, steps.append(made.step)
            elif made.publish:
                published = wanted
                mounted.append((now + timedelta(seconds=120), published))
            else:
                break
        assert isinstance(stored, Authorities)
        busy = stored.next or stored.old
        # The follower reads and signs one check late.
        if follower is None or follower[0] != stored.current or now >= follower[1] - timedelta(hours=12):
            served = follower or (stored.current, now + timedelta(hours=24))
            follower = stored.current, now + timedelta(hours=24)
        else:
            served = follower
        while len(mounted) > 1 and mounted[1][0] <= now:
            mounted.pop(0)
        trusted = mounted[0][1]
        if mounted[0][0] <= now:
            for signer in (stored.current, served[0]):
                assert signer.certificate in trusted, f"{now}: {steps[-3:]}"
            assert now < served[0].expires_at
        now += skip if busy else timedelta(hours=6)
        if deleted_every and stored.next and next(numbers) % deleted_every == 0:
            published = ""
    assert steps.count(Step.PROMOTE) + steps.count(Step.PROMOTE_LATE) >= 6
    assert Step.REPLACE not in steps
    assert deleted_every or Step.PROMOTE_LATE not in steps
