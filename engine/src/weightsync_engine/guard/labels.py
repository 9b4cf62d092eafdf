"""Says in every answer which versions may have made it: the one that let it in, and the one at its end.

A commit's permit is written before the engine goes on, so that no token is of a version newer than the one that
is read once the token is there. A stream's headers are sent before its tokens: each change is said in between, by
a comment of Server-Sent Events, which their readers skip.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final
from urllib.parse import quote

from weightsync_contract.messages import VersionId

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

VERSION_HEADER: Final = "x-weightsync-version"
RUN_HEADER: Final = "x-weightsync-run"
ADMITTED_HEADER: Final = "x-weightsync-admitted"
"""Version number that was served when the request was let in: with Keep, an answer's first tokens are its."""

ADMITTED_RUN_HEADER: Final = "x-weightsync-admitted-run"

_EVENTS: Final = b"text/event-stream"
_BOUNDARY: Final = (b"\n\n", b"\r\n\r\n", b"\r\r")


class Labelled:
    """An ASGI ``send`` that labels one answer. ``present`` is the version that is served now, None if unknown."""

    def __init__(
        self, send: Send, present: Callable[[], VersionId | None], admitted: VersionId | None
    ) -> None:
        self._send = send
        self._present = present
        self._admitted = admitted
        self._said = admitted
        self._stream = False
        self._between = True
        """Nothing of an event that has not ended was sent."""

    async def __call__(self, message: Message) -> None:
        """Pass it on, with what is to be said."""
        kind = message["type"]
        if kind == "http.response.start":
            message = self._start(message)
        elif kind == "http.response.body" and self._stream:
            message = self._body(message)
        await self._send(message)

    def _start(self, message: Message) -> Message:
        self._said = self._present() or self._admitted
        headers = list(message.get("headers", []))
        names = {name.lower(): value for name, value in headers}
        kind = names.get(b"content-type", b"").partition(b";")[0].strip().lower()
        # What is encoded, or as long as it said, can't be added to.
        fixed = b"content-encoding" in names or b"content-length" in names
        self._stream = kind == _EVENTS and not fixed
        return {**message, "headers": [*headers, *self._labels()]}

    def _labels(self) -> list[tuple[bytes, bytes]]:
        labels = []
        if self._said:
            labels += [(VERSION_HEADER, str(self._said.version)), (RUN_HEADER, _said(self._said.run))]
        if self._admitted:
            labels.append((ADMITTED_HEADER, str(self._admitted.version)))
            labels.append((ADMITTED_RUN_HEADER, _said(self._admitted.run)))
        return [(name.encode(), value.encode("ascii")) for name, value in labels]

    def _body(self, message: Message) -> Message:
        body = bytes(message.get("body", b""))
        now = self._present()
        mark = b""
        if now is not None and now != self._said and self._between:
            mark = f": {VERSION_HEADER}={now.version} {RUN_HEADER}={_said(now.run)}\n\n".encode("ascii")
            self._said = now
        if body:
            self._between = body.endswith(_BOUNDARY)
        return {**message, "body": mark + body}


def _said(run: str) -> str:
    return quote(run, safe="")
