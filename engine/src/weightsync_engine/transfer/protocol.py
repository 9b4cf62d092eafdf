"""What an agent says to its child and hears from it: one JSON object a line over a Unix stream socket.

The child holds torch and the group, does one command at a time, and answers each with exactly one last event
(``ANSWERS``); any error is ``Failed``, after which it exits. A command in ``WITH_FD`` carries one file
descriptor (SCM_RIGHTS), whose copy the child closes when the command is done. ``seconds`` is the command's
own deadline. No torch here: the agent imports this.
"""

import json
from dataclasses import dataclass
from typing import Final, TypeVar, get_args

from weightsync_contract.codec import MalformedError, from_document, to_document
from weightsync_contract.messages import Mode
from weightsync_contract.reasons import FailureCode

T = TypeVar("T")

# ------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class Listen:
    """Be rank 0: bind ``host:port`` (port 0: a free one), say ``Listening``, await the others: ``Ready``."""

    host: str
    port: int
    world_size: int
    nonce: str
    seconds: float
    backend: str = "Gloo"


@dataclass(frozen=True, slots=True)
class Join:
    """Be ``rank`` of the group whose rank 0 listens at ``endpoint`` (``host:port``): ``Ready``."""

    endpoint: str
    nonce: str
    rank: int
    world_size: int
    seconds: float
    backend: str = "Gloo"


@dataclass(frozen=True, slots=True)
class SendManifest:
    """Rank 0: give every member the manifest (``Manifest.encode()`` as text): ``ManifestSent``."""

    layout: str
    data: str
    seconds: float


@dataclass(frozen=True, slots=True)
class ReceiveManifest:
    """Member: take the manifest from rank 0: ``ManifestReceived``."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Prepare:
    """Have all memory of the staging file (fd, ``nbytes`` long) before a transfer needs it: ``Prepared``.

    The child keeps it mapped: a ``Receive`` into the same file pays no page faults. Until then, or until the
    next ``Prepare``, it can't be sealed.
    """

    nbytes: int
    seconds: float
    device: bool = False
    """The file tells where an engine's arena is (``cuda.place``), and that is what is meant."""


@dataclass(frozen=True, slots=True)
class Send:
    """Rank 0: broadcast the first ``nbytes`` of the file (fd): ``Progress`` each 200 ms, then ``Sent``."""

    nbytes: int
    layout: str
    buffer_bytes: int
    num_buffers: int
    seconds: float
    limit_rate: int = 0
    """Bytes a second; 0 for as fast as it goes."""
    mode: Mode = Mode.PACKED
    manifest: str = ""
    """``Manifest.encode()``; only PerTensor needs it."""
    version: str = ""
    """What a member that was told of another version refuses."""


@dataclass(frozen=True, slots=True)
class Receive:
    """Member: fill the first ``nbytes`` of the file (fd): ``Progress`` each 200 ms, ``Received``, ``Unmapped``.

    ``seconds`` are those until ``Received``. Unmapping has no deadline here; who waits for it kills the child.
    """

    nbytes: int
    layout: str
    buffer_bytes: int
    num_buffers: int
    seconds: float
    mode: Mode = Mode.PACKED
    manifest: str = ""
    verify: bool = True
    """Without it ``Received.digest`` is empty."""
    version: str = ""
    """What rank 0 has to announce; empty for anything."""
    device: bool = False
    """As for ``Prepare``."""


# --------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Started:
    """The child is warm: it has imported all it needs. Comes by itself, first and once."""


@dataclass(frozen=True, slots=True)
class Listening:
    """Rank 0's store is bound at ``endpoint`` (``host:port``, the real port); members may come."""

    endpoint: str


@dataclass(frozen=True, slots=True)
class Ready:
    """All ranks are in the group."""


@dataclass(frozen=True, slots=True)
class ManifestSent:
    """Every member's socket has the manifest. What they make of it they say themselves."""


@dataclass(frozen=True, slots=True)
class ManifestReceived:
    """The manifest, as ``Manifest.decode`` takes it, and its layout id as computed from these bytes."""

    layout: str
    data: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """The staging file has all its memory."""


@dataclass(frozen=True, slots=True)
class Progress:
    """``bytes`` of the image are through. Comes each 200 ms also when the number has not changed."""

    bytes: int


@dataclass(frozen=True, slots=True)
class Sent:
    """Rank 0 has sent everything. It proves nothing about what members hold."""


@dataclass(frozen=True, slots=True)
class Received:
    """The image is complete, and what it hashes to (``digest.ImageDigest``)."""

    digest: str


@dataclass(frozen=True, slots=True)
class Unmapped:
    """The child has no mapping any more of the file that it received into: it can be sealed."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The command failed and the child is ending: it is never used again."""

    code: FailureCode
    message: str


Command = Listen | Join | SendManifest | ReceiveManifest | Prepare | Send | Receive
Event = (
    Started
    | Listening
    | Ready
    | ManifestSent
    | ManifestReceived
    | Prepared
    | Progress
    | Sent
    | Received
    | Unmapped
    | Failed
)

WITH_FD: Final = (Prepare, Send, Receive)
"""Commands that come with one file descriptor."""

ANSWERS: Final[dict[type[Command], type[Event]]] = {
    Listen: Ready,
    Join: Ready,
    SendManifest: ManifestSent,
    ReceiveManifest: ManifestReceived,
    Prepare: Prepared,
    Send: Sent,
    Receive: Unmapped,
}
"""The event that ends each command when all went well."""

TIMEOUTS: Final[dict[type[Command], FailureCode]] = {
    Listen: FailureCode.JOIN_TIMEOUT,
    Join: FailureCode.JOIN_TIMEOUT,
    SendManifest: FailureCode.TRANSFER_TIMEOUT,
    ReceiveManifest: FailureCode.TRANSFER_TIMEOUT,
    Prepare: FailureCode.STAGING_FAILED,
    Send: FailureCode.TRANSFER_TIMEOUT,
    Receive: FailureCode.TRANSFER_TIMEOUT,
}
"""What a command that ran out of its ``seconds`` is called."""

_COMMANDS: Final[dict[str, type[Command]]] = {kind.__name__: kind for kind in ANSWERS}
_EVENTS: Final[dict[str, type[Event]]] = {kind.__name__: kind for kind in get_args(Event)}


def encode(message: Command | Event) -> bytes:
    """One line, newline included."""
    document = {"type": type(message).__name__, **to_document(message)}
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def decode_command(line: bytes) -> Command:
    """Parse a line that ``encode`` wrote of a command. Raises MalformedError."""
    return _decode(_COMMANDS, line)


def decode_event(line: bytes) -> Event:
    """Parse a line that ``encode`` wrote of an event. Raises MalformedError."""
    return _decode(_EVENTS, line)


def _decode(kinds: dict[str, type[T]], line: bytes) -> T:
    try:
        document = json.loads(line)
        kind = kinds[document["type"]]
    except (ValueError, KeyError, TypeError) as error:
        raise MalformedError(f"{line[:80]!r} is none of {', '.join(kinds)}") from error
    return from_document(kind, document)
