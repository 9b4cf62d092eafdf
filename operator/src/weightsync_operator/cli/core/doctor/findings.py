"""A finding: what is wrong, where, and what to do."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How grave it is."""

    PROBLEM = "problem"
    """It does not, or will not, work."""
    WARNING = "warning"
    """It works, and may bite."""
    UNKNOWN = "unknown"
    """It could not be looked at."""
    FINE = "fine"


_ORDER = tuple(Level)


@dataclass(frozen=True, slots=True)
class Finding:
    """``check`` names what was looked at, one word for scripts; ``subject`` what is concerned."""

    check: str
    level: Level
    subject: str
    message: str
    do: str = ""


def problem(check: str, subject: str, message: str, do: str) -> Finding:
    """It does not work; ``do`` says what would help."""
    return Finding(check, Level.PROBLEM, subject, message, do)


def warning(check: str, subject: str, message: str, do: str) -> Finding:
    """It may bite."""
    return Finding(check, Level.WARNING, subject, message, do)


def unknown(check: str, subject: str, message: str, do: str = "") -> Finding:
    """It could not be looked at, most often for want of a right."""
    return Finding(check, Level.UNKNOWN, subject, message, do)


def fine(check: str, message: str) -> Finding:
    """Nothing to object to."""
    return Finding(check, Level.FINE, "", message)


def in_order(found: Iterable[Finding]) -> list[Finding]:
    """Gravest first; otherwise as they came, each once."""
    return sorted(dict.fromkeys(found), key=lambda each: _ORDER.index(each.level))
