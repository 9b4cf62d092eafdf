"""Messages in and out of JSON text frames: ``{"type": "desired", ...}``."""

import json
from typing import Any, Final

from weightsync_contract.codec import MalformedError, from_document, to_document
from weightsync_contract.messages import Desired, Hello, Nack, Observed, Refused, Released, Welcome
from weightsync_contract.names import MAX_FRAME_BYTES

FromAgent = Hello | Observed | Nack
FromOperator = Welcome | Refused | Desired | Released

_FROM_AGENT: Final[dict[str, type[FromAgent]]] = {"hello": Hello, "observed": Observed, "nack": Nack}
_FROM_OPERATOR: Final[dict[str, type[FromOperator]]] = {
    "welcome": Welcome,
    "refused": Refused,
    "desired": Desired,
    "released": Released,
}
_NAMES: Final[dict[type, str]] = {
    kind: name for table in (_FROM_AGENT, _FROM_OPERATOR) for name, kind in table.items()
}


class OversizedError(MalformedError):
    """A frame longer than MAX_FRAME_BYTES."""


def encode(message: FromAgent | FromOperator) -> str:
    """One text frame. Raises OversizedError rather than send what the peer would refuse."""
    text = json.dumps({"type": _NAMES[type(message)], **to_document(message)}, separators=(",", ":"))
    if len(text.encode()) > MAX_FRAME_BYTES:
        name = _NAMES[type(message)]
        raise OversizedError(f"a {name} frame of {len(text)} bytes exceeds {MAX_FRAME_BYTES}")
    return text


def decode_from_agent(text: str) -> FromAgent:
    """What an agent sent. Raises MalformedError (OversizedError when too long)."""
    message: FromAgent = _decode(_FROM_AGENT, text)
    return message


def decode_from_operator(text: str) -> FromOperator:
    """What the operator sent. Raises MalformedError (OversizedError when too long)."""
    message: FromOperator = _decode(_FROM_OPERATOR, text)
    return message


def _decode(table: dict[str, Any], text: str) -> Any:
    # A lone surrogate is no text: it is counted here and refused by whoever reads the message.
    if len(text.encode(errors="surrogatepass")) > MAX_FRAME_BYTES:
        raise OversizedError(f"$: {len(text)} bytes, more than {MAX_FRAME_BYTES}")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"$: no JSON: {error}") from error
    if not isinstance(document, dict):
        raise MalformedError("$: expected an object")
    kind = document.get("type")
    if not isinstance(kind, str) or kind not in table:
        raise MalformedError(f"$.type: {kind!r:.40} is none of {', '.join(table)}")
    return from_document(table[kind], document)
