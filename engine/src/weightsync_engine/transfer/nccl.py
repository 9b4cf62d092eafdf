"""A NCCL group by NVIDIA's own bindings (nccl4py): one rank, on the GPU that is torch's current one.

NCCL tells of a dead peer late or never (over shared memory it tells nothing), so everything here has a deadline of
its own. Whoever holds a communicator that failed ends the process: nothing on its GPU can be relied on any more.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from weightsync_engine.transfer.communicator import TransportError, TransportTimeoutError
from weightsync_engine.transfer.rendezvous import Meeting

T = TypeVar("T")

ABORT_SECONDS: Final = 2.0
"""Longest wait for NCCL to give up a group; measured: 0.1 to 0.8 s."""
WARM_BYTES: Final = 32 << 20
"""What goes round once when the group has come about: NCCL connects at first use, and nobody is paused yet."""
_LEAST_PAUSE: Final = 20e-6
_LONGEST_PAUSE: Final = 1e-3
_ASYNC_SECONDS: Final = 0.05
"""Between two questions whether NCCL knows of an error."""


class NcclMissingError(ValueError):
    """NCCL can't be used here; the message says what is missing."""


def installed() -> str:
    """The NCCL that this process has loaded, as ``NCCL 2.32.3``. Raises NcclMissingError."""
    try:
        from nccl.core import get_version
    except ImportError as error:
        raise NcclMissingError(
            f"backend NCCL needs nccl4py and NCCL ({error}): install weightsync-engine[nccl]"
        ) from error
    library = get_version().libnccl
    if library is None:
        raise NcclMissingError("backend NCCL: libnccl.so.2 can't be loaded; is it in LD_LIBRARY_PATH?")
    if not torch.cuda.is_available():
        raise NcclMissingError(
            "backend NCCL: this container sees no GPU; give the agent's container the engine's or trainer's own"
        )
    return f"NCCL {library.version}"


class NcclWork:
    """A broadcast under way."""

    __slots__ = ("_event", "_group", "_memory")

    def __init__(self, group: "NcclCommunicator", event: torch.cuda.Event, memory: Tensor) -> None:
        self._group, self._event, self._memory = group, event, memory

    def wait(self, seconds: float) -> None:
        """Return once it is done here. Raises TransportError, TransportTimeoutError after ``seconds``."""
        now = time.monotonic()
        deadline, ask, pause = now + seconds, now + _ASYNC_SECONDS, _LEAST_PAUSE
        while not self._event.query():
            now = time.monotonic()
            if now >= ask:
                self._group.check()
                ask = now + _ASYNC_SECONDS
            if now >= deadline:
                raise TransportTimeoutError(f"a broadcast was not done within {seconds:.1f} s")
            time.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)


class NcclCommunicator:
    """One rank of one NCCL group."""

    def __init__(self, meeting: Meeting) -> None:
        """Join, once all others have come, and let some bytes go round. Raises RendezvousError."""
        from nccl.core import Communicator, UniqueId, get_unique_id

        self.rank, self.world_size = meeting.rank, meeting.world_size
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._stream: torch.cuda.Stream = torch.cuda.Stream(self.device)
        self._meeting = meeting
        self._comm: Any = None
        meeting.enter()
        if self.rank == 0:
            meeting.tell("nccl", bytes(get_unique_id()))
        # NCCL waits for all without a word: so it is not called before they are seen.
        meeting.gather()
        identity = UniqueId.from_bytes(meeting.hear("nccl"))
        try:
            self._comm = self._within(
                meeting.left, lambda: Communicator.init(self.world_size, self.rank, identity)
            )
            warm = torch.zeros(WARM_BYTES, dtype=torch.uint8, device=self.device)
            self.broadcast(warm, 0, meeting.left)
        except (TransportError, TimeoutError, RuntimeError) as error:
            raise meeting.failed(str(error) or "NCCL did not come to an end") from error

    def broadcast_async(self, tensor: Tensor, src: int, seconds: float) -> NcclWork:
        """Begin to bring ``tensor`` from ``src`` to everybody. Raises TransportError."""
        if self._comm is None:
            raise TransportError("the group was left already")
        if tensor.device != self.device or not tensor.is_contiguous():
            raise ValueError(
                f"a contiguous tensor on {self.device} can be broadcast, not one on {tensor.device}"
            )
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            self._comm.broadcast(tensor, tensor, src, stream=self._stream.cuda_stream)
        except Exception as error:
            # The bindings' errors share no class but Exception.
            raise TransportError(f"NCCL: {error}") from error
        event = torch.cuda.Event()
        event.record(self._stream)
        return NcclWork(self, event, tensor)

    def broadcast(self, tensor: Tensor, src: int, seconds: float) -> None:
        """The same, and wait for it."""
        self.broadcast_async(tensor, src, seconds).wait(seconds)

    def check(self) -> None:
        """Raises TransportError when NCCL knows that the group is broken."""
        from nccl.core import get_error_string

        if self._comm is None:
            raise TransportError("the group was left already")
        result = int(self._comm.get_async_error())
        if result != 0:
            raise TransportError(f"NCCL: {get_error_string(result)}")

    def close(self) -> None:
        """Leave the group, whatever is under way in it; idempotent."""
        comm, self._comm = self._comm, None
        if comm is not None:
            with contextlib.suppress(TimeoutError, RuntimeError):
                self._within(ABORT_SECONDS, comm.abort)

    def _within(self, seconds: float, call: Callable[[], T]) -> T:
        """Call what may never return, on a thread that is left behind if it does not. Raises TimeoutError."""
        found: list[T] = []
        failed: list[BaseException] = []

        def run() -> None:
            torch.cuda.set_device(self.device)
            try:
                found.append(call())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run, name="nccl", daemon=True)
        thread.start()
        thread.join(seconds)
        if failed:
            raise RuntimeError(f"NCCL: {failed[0]}") from failed[0]
        if not found:
            raise TimeoutError(f"NCCL did not answer within {seconds:.1f} s")
        return found[0]
