"""Whether a rollout is done, has failed, or is still to be waited for: read off the WeightSync alone."""

from dataclasses import dataclass
from typing import Any

from weightsync_contract.reasons import Condition, Reason
from weightsync_operator.cli.core.exits import Exit
from weightsync_operator.cli.core.page import Document, conditions

FAILURES = frozenset(
    {
        Reason.JOIN_TIMEOUT,
        Reason.TRANSFER_TIMEOUT,
        Reason.TRANSFER_FAILED,
        Reason.MANIFEST_REFUSED,
        Reason.DIGEST_MISMATCH,
        Reason.COMMIT_TIMEOUT,
        Reason.ENGINE_REJECTED,
        Reason.UNSUPPORTED,
        Reason.CHECK_FAILED,
        Reason.CANARY_LOST,
        Reason.ABORTED,
        Reason.VERSION_NOT_RETAINED,
    }
)
"""Reasons of Progressing=False that nobody but its user can end."""

AT_REST = frozenset({Reason.COMPLETE, Reason.ROLLED_BACK})
"""Reasons of Progressing where there is nothing left to do."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How it ended, in a word for scripts and a sentence for people."""

    exit: Exit
    message: str


def seen(document: Document) -> bool:
    """Has the operator looked at this spec?"""
    status: dict[str, Any] = document.get("status") or {}
    return int(status.get("observedGeneration", 0)) >= int(document["metadata"].get("generation", 0))


def judge(document: Document, live_phase: str = "") -> Verdict | None:
    """None while it is under way, or waits for something that may still come.

    ``live_phase``: what the operator says it does now, if it could be asked: the status shows what lasts only.
    """
    rows = conditions(document)
    ready, progressing = rows.get(Condition.READY), rows.get(Condition.PROGRESSING)
    if ready is None or progressing is None or not seen(document):
        return None
    if progressing.status == "False" and progressing.reason in FAILURES:
        return Verdict(Exit.FAILED, f"{progressing.reason}: {progressing.message}")
    if ready.status != "True" or (live_phase and live_phase != progressing.reason):
        return None
    if ready.reason == Reason.NO_MEMBERS:
        return Verdict(Exit.DONE, ready.message)
    if progressing.reason in AT_REST and ready.reason == Reason.SYNCED:
        return Verdict(Exit.DONE, progressing.message)
    return None
