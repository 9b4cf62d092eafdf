"""What can be wrong with a manifest, in the same words from every engine."""

from collections.abc import Sequence

from weightsync_engine.worker.protocol import Problem


def unknown(name: str) -> Problem:
    """No parameter of the model takes it."""
    return Problem(name, "the model has no such tensor", "publish the names that the model's checkpoint has")


def missing(name: str, why: str = "the manifest does not have it") -> Problem:
    """A parameter would keep its old values."""
    return Problem(name, why, "publish every tensor of the model: a part of them would mix two versions")


def wrong_shape(name: str, found: Sequence[int], wanted: Sequence[int] | None, hint: str = "") -> Problem:
    """It does not fit, or only a part of it would be used."""
    said = f"has shape {list(found)}" + (f", the model wants {list(wanted)}" if wanted is not None else "")
    said += f" ({hint})" if hint else ""
    return Problem(name, said, "train and serve the same architecture and sizes")


def wrong_dtype(name: str, found: str, wanted: str) -> Problem:
    """It would be cast without a word."""
    what = f"has dtype {found}, the model keeps it as {wanted} and would cast it silently"
    return Problem(name, what, f"publish it as {wanted}, or start the engine with --dtype {found}")
