"""Verbs write what the operator reads, and know its answer from an older one."""

from typing import Any

import pytest

from weightsync_contract.names import ANNOTATION_ACTION
from weightsync_operator.cli.core.exits import Exit
from weightsync_operator.cli.core.verbs import Ask, Verb, VerbError, answered, ask, parse_version

Document = dict[str, Any]


def row(kind: str, status: str, reason: str, message: str = "") -> Document:
    return {"type": kind, "status": status, "reason": reason, "message": message}


def document(*conditions: Document, generation: int = 3, observed: int = 3, **status: Any) -> Document:
    return {
        "metadata": {"name": "policy", "namespace": "default", "generation": generation},
        "spec": {},
        "status": {"observedGeneration": observed, "conditions": list(conditions), **status},
    }


ROLLOUT = {"run": "a", "version": 5, "outcome": "InProgress"}
CURRENT, PREVIOUS = {"run": "a", "version": 4}, {"run": "a", "version": 3}


def action_of(asked: Ask) -> str:
    return str(asked.patch["metadata"]["annotations"][ANNOTATION_ACTION])


@pytest.mark.parametrize(("verb", "paused"), [(Verb.PAUSE, True), (Verb.RESUME, False)])
def test_pause_and_resume_are_a_field_of_the_spec(verb: Verb, paused: bool) -> None:
    assert ask(verb, document()).patch == {"spec": {"paused": paused}}


@pytest.mark.parametrize("verb", [Verb.ABORT, Verb.RETRY, Verb.PROMOTE])
def test_a_word_about_a_rollout_names_the_one_that_is_seen(verb: Verb) -> None:
    asked = ask(verb, document(rollout=ROLLOUT), unique="77")
    assert (action_of(asked), asked.about) == (f"{verb}@a/5#77", "a/5")
    assert action_of(ask(verb, document(rollout=ROLLOUT), "b/9")) == f"{verb}@b/9"


@pytest.mark.parametrize(
    ("outcome", "to"),
    [("Succeeded", "a/3"), ("InProgress", "a/4"), ("Failed", "a/4"), ("Aborted", "a/4")],
)
def test_a_rollback_leaves_what_went_wrong(outcome: str, to: str) -> None:
    rollout = {**ROLLOUT, "outcome": outcome}
    asked = ask(Verb.ROLLBACK, document(rollout=rollout, current=CURRENT, previous=PREVIOUS))
    assert action_of(asked) == f"rollback@{to}"


def test_nothing_to_go_back_to() -> None:
    with pytest.raises(VerbError, match="no version before this one"):
        ask(Verb.ROLLBACK, document(rollout={**ROLLOUT, "outcome": "Succeeded"}, current=CURRENT))


def test_a_pin_names_run_and_version_and_latest_takes_both_away() -> None:
    source = {"run": "a", "pod": "trainer-0"}
    for text in ("a/4", "4"):
        assert ask(Verb.PIN, document(source=source), text).patch == {
            "spec": {"target": {"policy": "Pinned", "run": "a", "version": 4}}
        }
    # A merge patch leaves what it does not name.
    assert ask(Verb.PIN, document(), "latest").patch == {
        "spec": {"target": {"policy": "Latest", "run": None, "version": None}}
    }


@pytest.mark.parametrize("text", ["", "v4", "a/b/4", "4.5", "-1", "a b/4", "latest"])
def test_what_is_no_version_is_refused(text: str) -> None:
    with pytest.raises(VerbError, match="is no version: give a number, or run/number"):
        parse_version(text)


def test_a_number_without_a_run_needs_one() -> None:
    with pytest.raises(VerbError, match="give run/number"):
        ask(Verb.PIN, document(), "4")


def test_an_action_without_a_rollout_is_refused() -> None:
    with pytest.raises(VerbError, match="no rollout that could be meant by promote"):
        ask(Verb.PROMOTE, document())


def test_only_the_answer_to_this_word_counts() -> None:
    asked = ask(Verb.PROMOTE, document(rollout=ROLLOUT), unique="77")
    older = row("ActionTaken", "True", "Accepted", "promote@a/5#76: a/5 goes on")
    assert answered(asked, document()) is None
    assert answered(asked, document(older)) is None
    taken = answered(asked, document(row("ActionTaken", "True", "Accepted", "promote@a/5#77: it goes on")))
    assert taken is not None
    assert (taken.exit, taken.message) == (Exit.DONE, "it goes on")
    refused = answered(asked, document(row("ActionTaken", "False", "Stale", "promote@a/5#77: no: too late")))
    assert refused is not None
    assert (refused.exit, refused.message) == (Exit.FAILED, "no: too late")


def test_a_field_is_taken_once_the_operator_has_seen_that_generation() -> None:
    asked = ask(Verb.PAUSE, document())
    paused = row("Progressing", "False", "Paused", "a/5 waits")
    assert answered(asked, document(paused, generation=4)) is None
    taken = answered(asked, document(paused, generation=4, observed=4))
    assert taken is not None
    assert (taken.exit, taken.message) == (Exit.DONE, "no new phase starts: Paused: a/5 waits")


def test_what_this_operator_does_not_support_is_a_failure() -> None:
    verdict = answered(
        ask(Verb.PIN, document(), "a/4"), document(row("Progressing", "False", "Unsupported", "no"))
    )
    assert verdict is not None
    assert verdict.exit is Exit.FAILED
