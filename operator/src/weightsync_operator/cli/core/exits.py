"""Exit codes; scripts rest on them."""

from enum import IntEnum


class Exit(IntEnum):
    """How a command ended."""

    DONE = 0
    """What was asked for is so."""
    FAILED = 1
    """The rollout failed, the operator refused, or the doctor found a problem."""
    USAGE = 2
    """The command line can't be."""
    TIMEOUT = 3
    """It was not so within --timeout."""
    UNREACHABLE = 4
    """Nobody could be asked: no API server, no right, no such WeightSync."""
    INTERRUPTED = 130
    """Ctrl-C."""


MEANINGS = {
    Exit.DONE: "what was asked for is so",
    Exit.FAILED: "the rollout failed, the operator refused, or the doctor found a problem",
    Exit.USAGE: "the command line can't be",
    Exit.TIMEOUT: "it was not so within --timeout",
    Exit.UNREACHABLE: "nobody could be asked: no API server, no right, no such WeightSync",
    Exit.INTERRUPTED: "interrupted",
}
