"""What a trainer process and its agent say to each other: one JSON object a line over a Unix stream socket.

How the bytes travel, and why so. With ``Ready`` the agent passes the descriptor of a few small **slots** of shared
memory (a memfd, sealed against resizing, so that neither end can make the other fault). The client copies the next
piece of the flat image into a free slot and says ``Filled``; the agent copies it out, takes the digest of *its own
copy*, writes that to a file that only the agent has ever opened, and says ``Taken``. So the trainer never holds
anything through which it could change stored bytes, on purpose or by a stray pointer: no seal, lease or second look
is needed. The alternatives:

- A memfd of the version's size, written by the trainer and sealed afterwards, is as safe, but is lost with the agent,
  and catch-up has to survive an agent's restart. Copying it to a file too holds the version once more in memory.
- The stored file's own descriptor in the trainer's hands survives, but stays writable for every process that the
  trainer forked in the meantime. And a full tmpfs kills a trainer that writes by mmap (SIGBUS); here the agent gets
  ENOSPC before the first byte and answers with numbers.

The copy into a slot, the copy out of it and the digest run at the same time in two processes, on memory that stays in
the cache. Stored copies are charged to the agent's container, never to the trainer's.

A conversation: the agent greets; ``Begin`` and the tensors' description; ``Ready`` or ``Refused``; ``Filled`` and
``Taken`` until the image is complete; ``Seal``; ``Accepted`` or ``Refused``. After a refusal before ``Ready`` the
connection can go on; one that breaks in between leaves nothing behind. The publisher's connection stays open as long
as its process lives: that is how the agent knows. ``Goodbye`` says that the process ends as it should. Whoever only
wants to know what became of a version says ``Wait``, on a connection of its own.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from weightsync_contract.codec import MalformedError, from_document, to_document
from weightsync_contract.manifest import ManifestError
from weightsync_contract.messages import VersionId
from weightsync_contract.reasons import PublishCode

PROTOCOL: Final = 1
SOCKET_NAME: Final = "publish.sock"
DEFAULT_DIRECTORY: Final = "/run/weightsync"

MAX_LINE_BYTES: Final = 64 * 1024
MAX_DESCRIPTION_BYTES: Final = 256 << 20
"""Longest description of tensors that an agent reads; a million tensors with usual names are half of it."""

MAX_VERSION: Final = (1 << 63) - 1
_RUN: Final = re.compile(r"[A-Za-z0-9._-]{1,63}")


class PublishOutcome(StrEnum):
    """What became of a published version."""

    PUBLISHED = "published"
    """The agent holds a copy; nobody waited for more."""
    SERVING = "serving"
    """It is the fleet's version."""
    SUPERSEDED = "superseded"
    """A newer one took its place."""
    FAILED = "failed"
    """Its rollout ended otherwise; reason and message say how. The fleet serves on with what it had."""
    NO_MEMBERS = "no_members"
    """There is no inference pod. The copy is kept for those that come."""
    PENDING = "pending"
    """Not known when time was over. The rollout goes on by itself."""


# -------------------------------------------------------------------------------------------------- client to agent


@dataclass(frozen=True, slots=True)
class Begin:
    """A version is to be published. ``description_bytes`` of JSON (Description) follow the line."""

    run: str
    version: int
    description_bytes: int
    process: str
    """Random, one for each trainer process: tells a publisher's second connection from another publisher."""
    pid: int
    """In the trainer's own PID namespace: for messages, where the kernel can't say it."""


@dataclass(frozen=True, slots=True)
class Description:
    """The tensors in wire order, as the three parallel lists of a weight update."""

    names: tuple[str, ...]
    dtype_names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Filled:
    """The next slot holds the next ``bytes`` of the flat image."""

    bytes: int


@dataclass(frozen=True, slots=True)
class Seal:
    """The image is complete."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Say (``Settled``) what became of the version, as soon as it is known."""

    version: VersionId


@dataclass(frozen=True, slots=True)
class Goodbye:
    """This publisher's process ends, and that is as it should be."""


# -------------------------------------------------------------------------------------------------- agent to client


@dataclass(frozen=True, slots=True)
class Greeting:
    """First line on a connection. It comes at once from an agent that is alive."""

    protocol: int


@dataclass(frozen=True, slots=True)
class Ready:
    """Send the image: ``nbytes`` in all, through ``slots`` slots of ``slot_bytes`` each (fd), used in turn."""

    nbytes: int
    slots: int
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class Taken:
    """The oldest filled slot is free again."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The agent holds the version. ``digest`` is that of the bytes it holds."""

    digest: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The version can't be published, by the trainer's doing. Nothing has changed."""

    code: PublishCode
    message: str


@dataclass(frozen=True, slots=True)
class Broken:
    """The agent can't go on with this connection, and closes it. Nothing has changed; trying again may help."""

    message: str


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of a version that was waited for."""

    outcome: PublishOutcome
    reason: str = ""
    message: str = ""


FromClient = Begin | Filled | Seal | Wait | Goodbye
FromAgent = Greeting | Ready | Taken | Accepted | Refused | Broken | Settled

FROM_CLIENT: Final[Mapping[str, type[FromClient]]] = {kind.__name__: kind for kind in FromClient.__args__}
FROM_AGENT: Final[Mapping[str, type[FromAgent]]] = {kind.__name__: kind for kind in FromAgent.__args__}


def encode(message: FromClient | FromAgent) -> bytes:
    """One line, newline included."""
    document = {"type": type(message).__name__, **to_document(message)}
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def decode(kinds: Mapping[str, type[Any]], line: bytes) -> Any:
    """Parse a line that ``encode`` wrote of one of ``kinds``. Raises MalformedError."""
    try:
        document = json.loads(line)
        kind = kinds[document["type"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MalformedError(f"{line[:80]!r} is none of {', '.join(kinds)}") from error
    return from_document(kind, document)


def checked_version(run: object, version: object) -> VersionId:
    """The identity, if it can be one. Raises ManifestError with BAD_RUN or BAD_VERSION."""
    if not isinstance(run, str) or not _RUN.fullmatch(run):
        raise ManifestError(
            PublishCode.BAD_RUN,
            f"run {run!r:.80}: give 1 to 63 letters, digits, dots, dashes and underscores, or leave it out",
        )
    if type(version) is not int or not 0 <= version <= MAX_VERSION:
        raise ManifestError(
            PublishCode.BAD_VERSION,
            f"version {version!r:.80}: give a whole number from 0 that grows, a step for example",
        )
    return VersionId(run, version)
