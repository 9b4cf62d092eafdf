"""The permit: what lets an engine process answer. The agent writes it, the guard in the engine reads it.

It names the boot that it is for, so that a restarted engine has none however fast it is back. Whatever is not
exactly a permit counts as none.
"""

import json
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from weightsync_contract.messages import VersionId

MAX_BYTES: Final = 4096


class Mode(StrEnum):
    """What inference requests may do: go ahead, or wait until the commit under way has ended."""

    SERVE = "Serve"
    HOLD = "Hold"


_MODES: Final = frozenset(mode.value for mode in Mode)


@dataclass(frozen=True, slots=True)
class Permit:
    """``version`` is what the boot serves; None for the weights that it was started with."""

    boot: str
    mode: Mode
    version: VersionId | None


def write_permit(path: Path, permit: Permit | None) -> None:
    """Put ``permit`` in place of the present one, whole or not at all; None takes it away. Raises OSError."""
    if permit is None:
        path.unlink(missing_ok=True)
        return
    document = {
        "boot": permit.boot,
        "mode": permit.mode.value,
        "run": permit.version.run if permit.version else None,
        "version": permit.version.version if permit.version else None,
    }
    handle, name = tempfile.mkstemp(prefix=".permit-", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(document, file)
        # The engine may run as another user. The permit is no secret; its directory says who may write it.
        os.chmod(name, 0o644)  # noqa: PTH101
        os.replace(name, path)  # noqa: PTH105
    except BaseException:
        with suppress(OSError):
            os.unlink(name)  # noqa: PTH108
        raise


def read_permit(path: Path) -> Permit | None:
    """The permit at ``path``; None when it is missing, unreadable or malformed."""
    try:
        with path.open("rb") as file:
            return parse_permit(file.read(MAX_BYTES + 1))
    except OSError:
        return None


def parse_permit(data: bytes) -> Permit | None:
    """The permit that ``data`` is the JSON of, else None."""
    if len(data) > MAX_BYTES:
        return None
    try:
        document: Any = json.loads(data)
    except (ValueError, RecursionError):
        return None
    match document:
        case {"boot": str(boot), "mode": str(mode), "run": None, "version": None} if boot and mode in _MODES:
            return Permit(boot, Mode(mode), None)
        case {"boot": str(boot), "mode": str(mode), "run": str(run), "version": int(version)} if (
            boot and mode in _MODES and run and type(version) is int and version >= 0
        ):
            return Permit(boot, Mode(mode), VersionId(run, version))
    return None
