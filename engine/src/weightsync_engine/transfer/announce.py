"""Before rank 0 sends anything it says what: ranks that were told different things find out before a byte moves.

Without it gloo would fill a longer buffer with shorter data and call it done, or end the process.
"""

import json
from dataclasses import asdict, dataclass, fields
from typing import Final

import torch

from weightsync_engine.transfer.communicator import Communicator, TransportError

HEADER_BYTES: Final = 1024


@dataclass(frozen=True, slots=True)
class Announcement:
    """What comes next: an image of ``nbytes`` in pieces of ``piece_bytes``, or a manifest that is so long."""

    what: str
    nbytes: int
    piece_bytes: int = 0
    """Rank 0's choice, which members follow."""
    layout: str = ""
    version: str = ""
    mode: str = ""


def announce(group: Communicator, announcement: Announcement, seconds: float) -> None:
    """Rank 0: tell all members. Raises TransportError, ValueError for one that is too long."""
    data = json.dumps(asdict(announcement)).encode()
    if len(data) > HEADER_BYTES:
        raise ValueError(f"an announcement of {len(data)} bytes: names are too long")
    header = torch.frombuffer(bytearray(data.ljust(HEADER_BYTES)), dtype=torch.uint8)
    group.broadcast(header.to(group.device), 0, seconds)


def announced(group: Communicator, expected: Announcement, seconds: float) -> Announcement:
    """Member: hear what comes. Fields that are zero or empty in ``expected`` may be anything.

    Raises TransportError, naming each field that differs.
    """
    header = torch.zeros(HEADER_BYTES, dtype=torch.uint8, device=group.device)
    group.broadcast(header, 0, seconds)
    try:
        found = Announcement(**json.loads(header.cpu().numpy().tobytes()))
    except (ValueError, TypeError) as error:
        raise TransportError(f"rank 0 sent no announcement: {error}") from error
    wrong = [
        f"{field.name} is {theirs!r} there and {ours!r} here"
        for field in fields(Announcement)
        if (ours := getattr(expected, field.name)) and (theirs := getattr(found, field.name)) != ours
    ]
    if wrong:
        raise TransportError(f"rank 0 sends something else than was told here: {'; '.join(wrong)}")
    return found
