"""What a publisher is answered, for each way in which a fleet can stand."""

import pytest

from weightsync_contract.messages import Fleet, Rollout, VersionId
from weightsync_contract.reasons import Outcome, Reason
from weightsync_engine.publish.outcome import settled
from weightsync_engine.publish.protocol import PublishOutcome

MINE = VersionId("run", 5)
OLDER, NEWER, OTHER = VersionId("run", 4), VersionId("run", 6), VersionId("else", 9)


def rollout(version: VersionId, outcome: Outcome, reason: Reason = Reason.TRANSFERRING) -> Rollout:
    return Rollout(version, outcome, reason, "why")


@pytest.mark.parametrize(
    ("fleet", "expected"),
    [
        pytest.param(None, None, id="the operator was never heard"),
        pytest.param(Fleet(OLDER, None, 3, 3), None, id="the fleet is at an older one"),
        pytest.param(Fleet(OTHER, None, 3, 3), None, id="the fleet is at another run's"),
        pytest.param(Fleet(MINE, None, 3, 3), PublishOutcome.SERVING, id="it is the fleet's"),
        pytest.param(Fleet(NEWER, None, 3, 3), PublishOutcome.SUPERSEDED, id="a newer one is the fleet's"),
        pytest.param(Fleet(OLDER, None, 0, 0), PublishOutcome.NO_MEMBERS, id="nobody is there"),
        pytest.param(Fleet(OLDER, rollout(MINE, Outcome.IN_PROGRESS), 3, 0), None, id="under way"),
        pytest.param(Fleet(OLDER, rollout(OLDER, Outcome.FAILED), 3, 0), None, id="another one failed"),
        pytest.param(
            Fleet(OLDER, rollout(MINE, Outcome.FAILED, Reason.MANIFEST_REFUSED), 3, 0),
            PublishOutcome.FAILED,
            id="failed",
        ),
        pytest.param(
            Fleet(OLDER, rollout(MINE, Outcome.SUPERSEDED), 3, 0), PublishOutcome.SUPERSEDED, id="superseded"
        ),
        pytest.param(
            Fleet(OLDER, rollout(NEWER, Outcome.IN_PROGRESS), 3, 0),
            PublishOutcome.SUPERSEDED,
            id="skipped for a newer one",
        ),
        pytest.param(Fleet(OLDER, rollout(OTHER, Outcome.IN_PROGRESS), 3, 0), None, id="another run's"),
    ],
)
def test_outcomes(fleet: Fleet | None, expected: PublishOutcome | None) -> None:
    answer = settled(MINE, fleet)
    assert (answer.outcome if answer else None) == expected


def test_a_failure_carries_reason_and_message() -> None:
    answer = settled(MINE, Fleet(OLDER, rollout(MINE, Outcome.FAILED, Reason.MANIFEST_REFUSED), 3, 0))
    assert answer is not None
    assert (answer.reason, answer.message) == ("ManifestRefused", "why")
