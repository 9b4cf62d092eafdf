"""What a verb writes into the WeightSync, and how it is seen that the operator has taken it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from weightsync_contract.names import ANNOTATION_ACTION
from weightsync_contract.reasons import Condition, Outcome, Reason
from weightsync_operator.cli.core.exits import Exit
from weightsync_operator.cli.core.outlook import Verdict, seen
from weightsync_operator.cli.core.page import Document, conditions

_VERSION: Final = re.compile(r"(?:(?P<run>[^/@\s]{1,63})/)?(?P<version>\d{1,18})")


class Verb(StrEnum):
    """What can be asked of a rollout."""

    PAUSE = "pause"
    RESUME = "resume"
    ABORT = "abort"
    RETRY = "retry"
    PROMOTE = "promote"
    ROLLBACK = "rollback"
    PIN = "pin"


class VerbError(ValueError):
    """What was asked for can't be; the message says why and what can be done."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A merge patch of the WeightSync. ``about``: what it is about, for people; ``action``: the annotation's text."""

    verb: Verb
    patch: Mapping[str, Any]
    about: str
    action: str = ""


def parse_version(text: str) -> tuple[str, int]:
    """``run/12`` or ``12``; the run is empty where none is given. Raises VerbError."""
    found = _VERSION.fullmatch(text)
    if found is None:
        raise VerbError(f"{text!r} is no version: give a number, or run/number as status shows it")
    return found["run"] or "", int(found["version"])


def ask(verb: Verb, document: Document, version: str = "", unique: str = "") -> Ask:
    """What to write. ``version``: of which version, else the one that the verb is about now.

    ``unique`` tells this word from the same one said before, which was answered already. Raises VerbError.
    """
    if verb in (Verb.PAUSE, Verb.RESUME):
        return Ask(verb, {"spec": {"paused": verb is Verb.PAUSE}}, _rollout(document) or "the next version")
    if verb is Verb.PIN:
        return _pin(verb, document, version)
    if verb is Verb.ROLLBACK:
        version = version or _previous(document)
    run, number = _exactly(document, version or _rollout(document), verb)
    action = f"{verb}@{run}/{number}{f'#{unique}' if unique else ''}"
    return Ask(verb, {"metadata": {"annotations": {ANNOTATION_ACTION: action}}}, f"{run}/{number}", action)


def answered(asked: Ask, document: Document) -> Verdict | None:
    """None until the operator has answered. ``document``: the WeightSync as it is after the patch."""
    if asked.action:
        return _action_answered(asked, document)
    if not seen(document):
        return None
    progressing = conditions(document).get(Condition.PROGRESSING)
    if progressing is None:
        return None
    if progressing.reason == Reason.UNSUPPORTED:
        return Verdict(Exit.FAILED, progressing.message)
    return Verdict(Exit.DONE, f"{_DONE[asked.verb]}: {progressing.reason}: {progressing.message}")


_DONE: Final = {
    Verb.PAUSE: "no new phase starts",
    Verb.RESUME: "it goes on",
    Verb.PIN: "the target is taken",
}


def _pin(verb: Verb, document: Document, version: str) -> Ask:
    if version == "latest":
        target: dict[str, Any] = {"policy": "Latest", "run": None, "version": None}
        return Ask(verb, {"spec": {"target": target}}, "the newest version")
    run, number = _exactly(document, version, verb)
    target = {"policy": "Pinned", "run": run, "version": number}
    return Ask(verb, {"spec": {"target": target}}, f"{run}/{number}")


def _exactly(document: Document, version: str, verb: Verb) -> tuple[str, int]:
    """A version with its run, the present one's unless given."""
    if not version:
        raise VerbError(f"there is no rollout that could be meant by {verb}: name the version, as run/number")
    run, number = parse_version(version)
    run = run or ((document.get("status") or {}).get("source") or {}).get("run", "")
    if not run:
        raise VerbError(f"no trainer has published yet, so {number} is of no run: give run/number")
    return run, number


def _rollout(document: Document) -> str:
    rollout = (document.get("status") or {}).get("rollout")
    return f"{rollout['run']}/{rollout['version']}" if rollout else ""


def _previous(document: Document) -> str:
    status = document.get("status") or {}
    rollout = status.get("rollout") or {}
    # A rollout that did not end well is left for what the fleet was brought to; else that for the one before it.
    stuck = rollout.get("outcome") in (Outcome.IN_PROGRESS, Outcome.FAILED, Outcome.ABORTED)
    found = status.get("current" if stuck else "previous")
    if not found:
        raise VerbError("the fleet has had no version before this one: there is nothing to roll back to")
    return f"{found['run']}/{found['version']}"


def _action_answered(asked: Ask, document: Document) -> Verdict | None:
    """The answer repeats the annotation, then says what came of it."""
    row = conditions(document).get(Condition.ACTION_TAKEN)
    if row is None:
        return None
    about, _, message = row.message.partition(": ")
    if about != asked.action:
        return None
    return Verdict(Exit.DONE if row.status == "True" else Exit.FAILED, message)
