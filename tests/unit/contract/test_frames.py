"""Frames in and out: every message comes back as it went, and nothing but MalformedError comes of nonsense."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsync_contract import frames
from weightsync_contract.codec import MalformedError, from_document, to_document
from weightsync_contract.fleetview import FleetView, MemberView
from weightsync_contract.messages import (
    Desired,
    Failure,
    Group,
    Hello,
    Nack,
    ObjectRef,
    Observed,
    Phase,
    PodRef,
    Published,
    Refused,
    Released,
    Serving,
    ServingState,
    Source,
    Transfer,
    VersionId,
    Wanted,
    Welcome,
)
from weightsync_contract.names import MAX_FRAME_BYTES
from weightsync_contract.reasons import FailureCode, RefusalCode, Role

VERSION = VersionId("run", 7)
FROM_AGENT = [
    Hello(1, 1, PodRef("ns", "pod", "uid"), Role.TRAINER, "abc", 3),
    Observed(1, 2, 3, 1, serving=Serving(ServingState.SERVING, "boot", VERSION, "d")),
    Observed(
        1,
        2,
        3,
        1,
        transfer=Transfer(failure=Failure(FailureCode.PEER_LOST, "gone", 4, VERSION)),
        source=Source("run", True, (Published(VERSION, "l", "d", 5, 1),)),
    ),
    Nack(1, 2, RefusalCode.STALE_TERM, "older"),
]
FROM_OPERATOR = [
    Welcome(1, 5.0, 15.0),
    Refused(RefusalCode.NOT_LEADER, "elsewhere", "host:1"),
    Desired(
        ObjectRef("ns", "name", "uid"),
        4,
        5,
        group=Group(6, "nonce", 1, 1, 3, "host:2"),
        wanted=Wanted(VERSION, "l", "d", 100, Phase.TRANSFER),
        allowed=(VERSION, VersionId("run", 8)),
    ),
    Released(3, "nobody"),
]


@pytest.mark.parametrize("message", FROM_AGENT, ids=lambda m: type(m).__name__)
def test_what_an_agent_says_comes_back_as_it_went(message: Any) -> None:
    assert frames.decode_from_agent(frames.encode(message)) == message


@pytest.mark.parametrize("message", FROM_OPERATOR, ids=lambda m: type(m).__name__)
def test_what_the_operator_says_comes_back_as_it_went(message: Any) -> None:
    assert frames.decode_from_operator(frames.encode(message)) == message


def test_neither_side_takes_the_other_ones_words() -> None:
    with pytest.raises(MalformedError, match="none of hello, observed, nack"):
        frames.decode_from_agent(frames.encode(FROM_OPERATOR[0]))
    with pytest.raises(MalformedError, match="none of welcome"):
        frames.decode_from_operator(frames.encode(FROM_AGENT[0]))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        pytest.param(
            ("protocolMin",), "1", r"\$\.protocolMin: expected int, got str", id="a text for a number"
        ),
        pytest.param(("protocolMin",), True, "expected int, got bool", id="a truth for a number"),
        pytest.param(("pod",), "pod", r"\$\.pod: expected an object", id="a text for an object"),
        pytest.param(("pod", "uid"), 5, r"\$\.pod\.uid: expected str", id="deep inside"),
        pytest.param(("role",), "boss", r"\$\.role: 'boss' is none of trainer, inference", id="no such role"),
        pytest.param(("incarnation",), None, r"\$\.incarnation: missing", id="missing"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(path: tuple[str, ...], value: Any, message: str) -> None:
    document = json.loads(frames.encode(FROM_AGENT[0]))
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(MalformedError, match=message):
        frames.decode_from_agent(json.dumps(document))


def test_fields_of_a_newer_release_are_ignored() -> None:
    document = {**json.loads(frames.encode(FROM_AGENT[3])), "later": {"a": 1}}
    assert frames.decode_from_agent(json.dumps(document)) == FROM_AGENT[3]


@pytest.mark.parametrize("text", ["", "[]", "7", "{", '{"type":5}', '{"type":"x"}', "[" * 100_000])
def test_what_is_no_frame_is_refused(text: str) -> None:
    with pytest.raises(MalformedError):
        frames.decode_from_agent(text)


def test_a_frame_over_the_limit_is_neither_sent_nor_taken() -> None:
    long = Nack(1, 2, RefusalCode.MALFORMED, "x" * MAX_FRAME_BYTES)
    with pytest.raises(frames.OversizedError):
        frames.encode(long)
    with pytest.raises(frames.OversizedError):
        frames.decode_from_agent("x" * (MAX_FRAME_BYTES + 1))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)
KEYS = st.sampled_from(
    [
        "type",
        "term",
        "seq",
        "pod",
        "role",
        "group",
        "transfer",
        "serving",
        "source",
        "versions",
        "state",
        "code",
    ]
)


@given(st.dictionaries(KEYS, JSON | st.sampled_from(["hello", "observed", "nack", "desired"]), max_size=8))
def test_nonsense_is_malformed_and_nothing_else(document: dict[str, Any]) -> None:
    for decode in (frames.decode_from_agent, frames.decode_from_operator):
        try:
            message = decode(json.dumps(document))
        except MalformedError:
            continue
        assert decode(frames.encode(message)) == message


def test_a_fleet_is_read_as_it_was_written() -> None:
    member = MemberView("pod", "uid", "inference", True, 1, 1, Transfer(), Serving())
    view = FleetView("ns", "name", 1, 2, 3, "Idle", "", VERSION, None, (member,))
    assert from_document(FleetView, json.loads(json.dumps(to_document(view)))) == view
