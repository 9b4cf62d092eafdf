"""A page says what the operator knows; without it, what status and pods say, and no more."""

from datetime import UTC, datetime
from typing import Any

import pytest

from weightsync_contract.fleetview import FleetView, MemberView
from weightsync_contract.messages import (
    Failure,
    Published,
    Serving,
    ServingState,
    Source,
    Transfer,
    TransferState,
    VersionId,
)
from weightsync_contract.reasons import FailureCode
from weightsync_operator.cli import show
from weightsync_operator.cli.core.page import Page, Tone, brief_age, brief_bytes, make_page

NOW = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
V4, V5 = VersionId("run", 4), VersionId("run", 5)


def document(**status: Any) -> dict[str, Any]:
    return {
        "metadata": {"namespace": "default", "name": "policy", "generation": 1},
        "spec": {"paused": False},
        "status": {
            "synced": "1/2",
            "group": {"epoch": 3, "worldSize": 3, "members": ["0:1:trainer-0:t", "1:2:vllm-0:a"]},
            "current": {"run": "run", "version": 4},
            "rollout": {"run": "run", "version": 5, "outcome": "InProgress"},
            "conditions": [
                {"type": "Ready", "status": "True", "reason": "RollingOut", "message": "5 is on its way"},
                {"type": "Progressing", "status": "True", "reason": "Transferring", "message": "to vllm-0"},
            ],
            **status,
        },
    }


def pod(name: str, uid: str, ready: bool = True) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "uid": uid,
            "labels": {"weightsync.dev/role": "inference"},
            "creationTimestamp": "2026-01-01T11:55:00Z",
        },
        "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": str(ready)}]},
    }


def member(name: str, uid: str, rank: int = 1, **more: Any) -> MemberView:
    fields: dict[str, Any] = {
        "transfer": Transfer(),
        "serving": Serving(ServingState.SERVING, version=V4),
        **more,
    }
    return MemberView(name, uid, "inference", fields.pop("connected", True), 2, rank, **fields)


def view(*members: MemberView) -> FleetView:
    source = Source("run", connected=True, versions=(Published(V5, "layout", "digest", 8),))
    trainer = MemberView("trainer-0", "t", "trainer", True, 1, 0, Transfer(TransferState.SENT), source=source)
    return FleetView("default", "policy", 1, 3, 3, "Transferring", "", V5, V4, (trainer, *members))


def page(*members: MemberView) -> Page:
    return make_page(document(), view(*members), [pod("vllm-0", "a")], NOW)


def test_a_member_that_receives() -> None:
    receiving = Transfer(TransferState.RECEIVING, bytes=3 << 20, total_bytes=8 << 20)
    shown = page(member("vllm-0", "a", transfer=receiving))
    row = shown.members[1]
    assert (row.rank, row.ranks, row.version, row.phase) == (1, 2, "run/4", "Receiving")
    assert (row.bytes, row.total_bytes, row.age, row.tone) == (3 << 20, 8 << 20, 300, Tone.BUSY)
    text = show.text_of(show.page(shown))
    assert " 37% of 8 MiB" in text
    assert "1-2" in text
    assert show.line(shown) == "default/policy  Transferring  30 %  target run/5  synced 1/2  serving run/4"


@pytest.mark.parametrize(
    ("more", "phase", "version", "tone"),
    [
        ({}, "Serving", "run/4", Tone.QUIET),
        ({"serving": Serving(ServingState.SERVING, version=V5)}, "Serving", "run/5", Tone.GOOD),
        ({"serving": Serving(ServingState.FENCED)}, "Fenced", "", Tone.BAD),
        ({"serving": Serving(ServingState.APPLYING)}, "Applying", "", Tone.BUSY),
        ({"serving": None}, "Idle", "", Tone.QUIET),
        ({"connected": False}, "NotConnected", "run/4", Tone.BAD),
        ({"transfer": Transfer(TransferState.STAGED)}, "Staged", "run/4", Tone.QUIET),
        ({"transfer": Transfer(TransferState.JOINED)}, "Serving", "run/4", Tone.QUIET),
    ],
)
def test_what_a_member_does(more: dict[str, Any], phase: str, version: str, tone: Tone) -> None:
    row = page(member("vllm-0", "a", **more)).members[1]
    assert (row.phase, row.version, row.tone) == (phase, version, tone)


def test_why_is_the_operators_word_else_the_agents() -> None:
    failure = Transfer(failure=Failure(FailureCode.PEER_LOST, "rank 2 is gone"))
    assert page(member("vllm-0", "a", transfer=failure)).members[1].why == "rank 2 is gone"
    assert page(member("vllm-0", "a", transfer=failure, message="left out")).members[1].why == "left out"


def test_the_reason_is_read_on_a_narrow_terminal_too() -> None:
    why = "fenced three times in ten minutes: the engine did not confirm finish on all ranks"
    shown = page(member("vllm-5f7c9d-klmno", "a", message=f"vllm-5f7c9d-klmno: {why}"))
    text = show.text_of(show.page(shown), width=80)
    assert why in " ".join(text.split())
    assert text.count("vllm-5f7c9d-klmno") == 2, "once in the table, once before its reason"


def test_a_trainer_shows_what_it_published_last() -> None:
    row = page().members[0]
    assert (row.version, row.phase, row.rank) == ("run/5", "Publishing", 0)


def test_without_the_operator_ranks_are_the_statuss_and_nothing_is_made_up() -> None:
    pods = [pod("vllm-0", "a"), pod("vllm-1", "b", ready=False)]
    shown = make_page(document(), None, pods, NOW, "no right")
    assert not shown.live
    assert [(row.name, row.rank, row.version, row.phase) for row in shown.members] == [
        ("vllm-0", 1, "", "Ready"),
        ("vllm-1", -1, "", "Running"),
    ]
    assert (shown.target, shown.current, shown.epoch, shown.phase) == ("run/5", "run/4", 3, "Transferring")
    assert "no live view: no right" in show.text_of(show.page(shown))


def test_without_pods_the_newest_rank_map_is_shown() -> None:
    shown = make_page(document(), None, None, NOW)
    assert [(row.name, row.rank, row.age) for row in shown.members] == [
        ("trainer-0", 0, -1),
        ("vllm-0", 1, -1),
    ]


def test_a_weightsync_that_nobody_has_looked_at() -> None:
    new = {"metadata": {"namespace": "default", "name": "policy"}, "spec": {}}
    shown = make_page(new, None, [], NOW)
    assert (shown.ready, shown.reason) == ("Unknown", "NotSeenYet")
    assert "no operator has looked at this WeightSync yet" in show.text_of(show.page(shown))


def test_an_overview_has_a_line_for_each() -> None:
    text = show.text_of(show.overview([make_page(document(), None, None, NOW)], everywhere=True))
    assert [line.split() for line in text.splitlines()] == [
        ["NAMESPACE", "NAME", "READY", "CURRENT", "TARGET", "SYNCED", "PHASE"],
        ["default", "policy", "True", "run/4", "run/5", "1/2", "Transferring"],
    ]


def test_json_has_every_field() -> None:
    text = show.as_json(page(member("vllm-0", "a")))
    for field in ('"worldSize": 3', '"totalBytes": 0', '"live": true', '"tone": "quiet"'):
        assert field in text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 KiB"), (5 << 20, "5 MiB"), (3 << 29, "1.5 GiB"), (140 << 30, "140 GiB")],
)
def test_bytes_for_people(nbytes: int, text: str) -> None:
    assert brief_bytes(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, ""), (5, "5s"), (119, "119s"), (120, "2m"), (7200, "2h"), (400000, "4d")]
)
def test_ages_for_people(seconds: int, text: str) -> None:
    assert brief_age(seconds) == text
