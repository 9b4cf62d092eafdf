"""Between an image in the host's memory and a group of GPUs: pieces go through a few slots in device memory.

While one piece is on the network, the one before is copied to the host, or the next one from it.
"""

import contextlib
import mmap
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from weightsync_engine.transfer.carriers import Landed, Route
from weightsync_engine.transfer.cuda.pinned import Pinned, PinnedAhead, PinningError


class DeviceCarrier:
    """For groups whose tensors are on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Of its own: a broadcast waits for what this stream was given before it, and for nothing else.
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)
        self._pinned: Pinned | None = None
        self._slots: list[Tensor] = []

    def prepare(self, memory: mmap.mmap, nbytes: int) -> None:
        """Pin it: the GPU's copy engine then writes it at the bus's rate."""
        self.release()
        with contextlib.suppress(PinningError):
            # Slower without, and no less right.
            self._pinned = Pinned(memory, nbytes, writable=True)

    def release(self) -> None:
        """Unpin it."""
        pinned, self._pinned = self._pinned, None
        if pinned:
            pinned.close()

    @contextlib.contextmanager
    def sending(
        self, memory: mmap.mmap, nbytes: int, longest: int, count: int, done: Landed
    ) -> Iterator[Route]:
        """Each piece is copied to a slot, through pinned memory where the image's own can't be pinned."""
        image = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes)
        slots = self._slots_of(longest, count)
        try:
            pinned = PinnedAhead(memory, nbytes)
        except PinningError:
            pinned = None
        bounce = (
            [] if pinned else [torch.empty(len(slots[0]), dtype=torch.uint8, pin_memory=True) for _ in slots]
        )
        turn = 0

        def piece(start: int, end: int) -> Tensor:
            nonlocal turn
            slot = slots[turn % count][: end - start]
            if pinned:
                for begin, until in pinned.parts(start, end):
                    slot[begin - start : until - start].copy_(image[begin:until], non_blocking=True)
            else:
                # Free again, as the slot is: the broadcast that read from it is over.
                source = bounce[turn % count][: end - start].copy_(image[start:end])
                slot.copy_(source, non_blocking=True)
            turn += 1
            return slot

        try:
            with torch.cuda.stream(self._stream):
                yield Route(piece, done, lambda: None)
        finally:
            if pinned:
                self._stream.synchronize()
                pinned.close()

    @contextlib.contextmanager
    def receiving(
        self, memory: mmap.mmap, nbytes: int, longest: int, count: int, done: Landed
    ) -> Iterator[Route]:
        """Each piece is received into a slot and copied from there."""
        image = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes)
        slots = self._slots_of(longest, count)
        landing: deque[Tensor] = deque()
        copying: deque[tuple[torch.cuda.Event, int, int]] = deque()
        turn = 0

        def piece(start: int, end: int) -> Tensor:
            nonlocal turn
            # The copy of what was in it is on the stream already, and the broadcast waits for the stream.
            landing.append(slots[turn % count][: end - start])
            turn += 1
            return landing[-1]

        def landed(start: int, end: int) -> None:
            image[start:end].copy_(landing.popleft(), non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            tell(1)
            copying.append((event, start, end))

        def tell(left: int) -> None:
            while len(copying) > left:
                event, start, end = copying.popleft()
                event.synchronize()
                done(start, end)

        with torch.cuda.stream(self._stream):
            yield Route(piece, landed, lambda: tell(0))

    def _slots_of(self, nbytes: int, count: int) -> list[Tensor]:
        """Device memory for pieces under way, used in turn; kept for the next image."""
        if len(self._slots) != count or len(self._slots[0]) < nbytes:
            self._slots = []
            self._slots = [torch.empty(nbytes, dtype=torch.uint8, device=self._device) for _ in range(count)]
        return self._slots
