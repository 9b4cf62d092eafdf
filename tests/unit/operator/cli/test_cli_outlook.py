"""When a watch ends, and with what."""

from typing import Any

import pytest

from weightsync_operator.cli.core.exits import Exit
from weightsync_operator.cli.core.outlook import judge


def document(
    ready: tuple[str, str], progressing: tuple[str, str], observed: int = 2, **status: Any
) -> dict[str, Any]:
    rows = [
        {"type": kind, "status": row[0], "reason": row[1], "message": f"{kind} says"}
        for kind, row in (("Ready", ready), ("Progressing", progressing))
    ]
    return {
        "metadata": {"generation": 2},
        "status": {"observedGeneration": observed, "conditions": rows, **status},
    }


SYNCED, COMPLETE = ("True", "Synced"), ("True", "Complete")


@pytest.mark.parametrize(
    ("ready", "progressing", "exit_"),
    [
        (SYNCED, COMPLETE, Exit.DONE),
        (("True", "NoMembers"), ("False", "NoMembers"), Exit.DONE),
        (("False", "Degraded"), ("False", "TransferTimeout"), Exit.FAILED),
        (("True", "Synced"), ("False", "DigestMismatch"), Exit.FAILED),
        (("False", "Unsupported"), ("False", "Unsupported"), Exit.FAILED),
        (SYNCED, ("False", "Aborted"), Exit.FAILED),
        (SYNCED, ("False", "CheckFailed"), Exit.FAILED),
        (SYNCED, ("False", "RolledBack"), Exit.DONE),
        # On their way back they are not done.
        (("True", "RollingOut"), ("False", "RolledBack"), None),
        (("True", "RollingOut"), ("True", "Transferring"), None),
        # Somebody lags behind: it is not done before he is there.
        (("False", "Degraded"), COMPLETE, None),
        # These end by what may still come: a promotion, a resume, a trainer.
        (("True", "RollingOut"), ("False", "Paused"), None),
        (("True", "RollingOut"), ("True", "CanaryPaused"), None),
        (("False", "WaitingForFirstVersion"), ("False", "WaitingForFirstVersion"), None),
        (SYNCED, ("Unknown", "WaitingForRoster"), None),
        (("Unknown", "Synced"), COMPLETE, None),
    ],
)
def test_how_it_ends(ready: tuple[str, str], progressing: tuple[str, str], exit_: Exit | None) -> None:
    verdict = judge(document(ready, progressing))
    assert (verdict.exit if verdict else None) == exit_


def test_an_older_generations_status_says_nothing() -> None:
    assert judge(document(SYNCED, COMPLETE, observed=1)) is None


def test_a_new_object_is_waited_for() -> None:
    assert judge({"metadata": {"generation": 1}}) is None


def test_what_the_operator_does_now_counts_before_the_status_shows_it() -> None:
    resting = document(SYNCED, COMPLETE)
    assert judge(resting, "Transferring") is None
    verdict = judge(resting, "Complete")
    assert verdict is not None
    assert verdict.exit is Exit.DONE
