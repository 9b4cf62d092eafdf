"""The libraries that move bytes, by name."""

from typing import Final

from weightsync_engine.transfer.communicator import Communicator
from weightsync_engine.transfer.rendezvous import Meeting

GLOO: Final = "Gloo"
NCCL: Final = "NCCL"


class UnsupportedError(ValueError):
    """There is no such backend; the message says which there are."""


def library(backend: str) -> str:
    """What all ranks of a group must have the same of, as ``NCCL 2.32.3``; empty where any will do.

    Raises UnsupportedError; NcclMissingError, a ValueError, where NCCL can't be used.
    """
    if backend == GLOO:
        return ""
    if backend == NCCL:
        from weightsync_engine.transfer.nccl import installed

        return installed()
    raise UnsupportedError(f"backend {backend!r}: there are {GLOO} and {NCCL}")


def open_communicator(backend: str, meeting: Meeting) -> Communicator:
    """Join the group that meets there. Raises UnsupportedError, RendezvousError."""
    if backend == GLOO:
        from weightsync_engine.transfer.gloo import GlooCommunicator

        return GlooCommunicator(meeting)
    if backend == NCCL:
        from weightsync_engine.transfer.nccl import NcclCommunicator

        return NcclCommunicator(meeting)
    raise UnsupportedError(f"backend {backend!r}: there are {GLOO} and {NCCL}")
