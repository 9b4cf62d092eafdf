"""The libraries that move bytes, by name."""

from weightsync_engine.transfer.communicator import Communicator


class UnsupportedError(ValueError):
    """Asked for what this release does not have; the message names the release that will."""


def open_communicator(
    backend: str, host: str, port: int, rank: int, world_size: int, nonce: str, seconds: float
) -> Communicator:
    """Join a group by the name of its backend. Raises UnsupportedError, RendezvousError."""
    if backend == "Gloo":
        from weightsync_engine.transfer.gloo import GlooCommunicator

        return GlooCommunicator.join(host, port, rank, world_size, nonce, seconds)
    raise UnsupportedError(f"backend {backend!r}: this release has Gloo; NCCL comes with 0.2")
