"""What answers say of the versions that may have made them, streams included."""

import pytest

from weightsync_contract.messages import VersionId
from weightsync_engine.guard.labels import Labelled

V1, V2, OTHER = VersionId("run-a", 1), VersionId("run-a", 2), VersionId("run b/ü", 1)
EVENTS = [(b"Content-Type", b"text/event-stream; charset=utf-8")]
MARK = b": x-weightsync-version=2 x-weightsync-run=run-a\n\n"


class Answering:
    """An answer of which each piece is sent while some version is served."""

    def __init__(self, admitted=V1) -> None:
        self.now, self.sent = admitted, []
        self.labelled = Labelled(self._keep, lambda: self.now, admitted)

    async def _keep(self, message) -> None:
        self.sent.append(message)

    async def start(self, headers=()) -> dict[str, str]:
        await self.labelled({"type": "http.response.start", "status": 200, "headers": list(headers)})
        return {name.decode().lower(): value.decode() for name, value in self.sent[0]["headers"]}

    async def say(self, *pieces) -> bytes:
        first = len(self.sent)
        for piece in pieces:
            await self.labelled({"type": "http.response.body", "body": piece, "more_body": True})
        return b"".join(message["body"] for message in self.sent[first:])


@pytest.mark.parametrize(
    ("admitted", "now", "headers"),
    [
        (V1, V1, ("1", "run-a", "1", "run-a")),
        (V1, V2, ("2", "run-a", "1", "run-a")),
        (V2, OTHER, ("1", "run%20b%2F%C3%BC", "2", "run-a")),
        (V1, None, ("1", "run-a", "1", "run-a")),
        (None, V1, ("1", "run-a", None, None)),
        (None, None, (None, None, None, None)),
    ],
)
async def test_the_headers_name_both_ends(admitted, now, headers):
    answer = Answering(admitted)
    answer.now = now
    found = await answer.start([(b"x-own", b"1")])
    names = ("version", "run", "admitted", "admitted-run")
    assert tuple(found.get(f"x-weightsync-{name}") for name in names) == headers
    assert found["x-own"] == "1"


async def test_a_stream_says_where_the_version_changed_and_nothing_else():
    answer = Answering()
    await answer.start(EVENTS)
    assert await answer.say(b"data: a\n\n", b"data: b\n\n") == b"data: a\n\ndata: b\n\n"
    answer.now = V2
    assert await answer.say(b"data: c\n\n", b"data: d\n\n") == MARK + b"data: c\n\ndata: d\n\n"


async def test_a_stream_says_each_change():
    answer = Answering()
    await answer.start(EVENTS)
    answer.now = V2
    await answer.say(b"data: a\n\n")
    answer.now = OTHER
    assert (await answer.say(b"data: b\n\n")).startswith(b": x-weightsync-version=1 x-weightsync-run=run%20b")


async def test_what_the_headers_said_is_not_said_again():
    answer = Answering()
    answer.now = V2
    assert (await answer.start(EVENTS))["x-weightsync-version"] == "2"
    assert await answer.say(b"data: a\n\n") == b"data: a\n\n"


async def test_an_event_is_not_cut_in_two():
    answer = Answering()
    await answer.start(EVENTS)
    await answer.say(b"data: a")
    answer.now = V2
    assert await answer.say(b"bc\n\n", b"data: d\r\n\r\n") == b"bc\n\n" + MARK + b"data: d\r\n\r\n"


async def test_a_change_after_the_last_event_is_said_at_the_end():
    answer = Answering()
    await answer.start(EVENTS)
    await answer.say(b"data: a\n\n")
    answer.now = V2
    assert await answer.say(b"") == MARK


async def test_without_a_permit_nothing_new_is_said():
    answer = Answering()
    await answer.start(EVENTS)
    answer.now = None
    assert await answer.say(b"data: a\n\n") == b"data: a\n\n"


@pytest.mark.parametrize(
    "headers",
    [
        [(b"content-type", b"application/json")],
        [],
        [*EVENTS, (b"content-encoding", b"gzip")],
        [*EVENTS, (b"content-length", b"9")],
    ],
)
async def test_what_can_not_be_added_to_is_left_alone(headers):
    answer = Answering()
    await answer.start(headers)
    answer.now = V2
    assert await answer.say(b"data: a\n\n") == b"data: a\n\n"
