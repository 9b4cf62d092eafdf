"""A queue of keys that deduplicates, delays and backs off: one key is never worked on twice at a time."""

import asyncio
import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class WorkQueue(Generic[K]):
    """Belongs to one event loop; every call is made on it.

    A key added while it is worked on is worked on again afterwards. ``add_after`` keeps the earliest time.
    """

    def __init__(
        self,
        base_seconds: float = 0.01,
        max_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base_seconds = base_seconds
        self._max_seconds = max_seconds
        self._clock = clock
        self._ready: dict[K, None] = {}
        self._working: set[K] = set()
        self._again: set[K] = set()
        self._delayed: dict[K, tuple[float, asyncio.TimerHandle]] = {}
        self._failures: dict[K, int] = {}
        self._waiters: set[asyncio.Future[None]] = set()
        self.ticked_at = clock()
        """When it was last turned; monotonic seconds."""

    def __len__(self) -> int:
        return len(self._ready) + len(self._again)

    def add(self, key: K) -> None:
        """Work on ``key`` as soon as possible."""
        self._cancel_delay(key)
        if key in self._working:
            self._again.add(key)
            return
        self._ready[key] = None
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
                break

    def add_after(self, key: K, seconds: float) -> None:
        """Work on ``key`` in ``seconds`` at the latest."""
        if key in self._ready or key in self._again:
            return
        due = self._clock() + seconds
        if key in self._delayed:
            if self._delayed[key][0] <= due:
                return
            self._cancel_delay(key)
        handle = asyncio.get_running_loop().call_later(max(0.0, seconds), self.add, key)
        self._delayed[key] = (due, handle)

    def retry(self, key: K) -> float:
        """Work on ``key`` again after a delay that doubles with each failure in a row; answers the delay."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        seconds = min(self._base_seconds * 2.0 ** min(failures, 40), self._max_seconds)
        self.add_after(key, seconds)
        return seconds

    def succeeded(self, key: K) -> None:
        """Forget the failures of ``key``."""
        self._failures.pop(key, None)

    def forget(self, key: K) -> None:
        """Drop whatever is planned for ``key``: it is gone."""
        self.succeeded(key)
        self._cancel_delay(key)
        self._again.discard(key)

    async def take(self, tick_seconds: float = 1.0) -> K:
        """The next key; it is worked on until ``done``. Ticks at least every ``tick_seconds``."""
        while not self._ready:
            self.tick()
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await asyncio.wait([waiter], timeout=tick_seconds)
            finally:
                self._waiters.discard(waiter)
        self.tick()
        key = next(iter(self._ready))
        del self._ready[key]
        self._working.add(key)
        return key

    def done(self, key: K) -> None:
        """``key`` is no longer worked on."""
        self.tick()
        self._working.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def tick(self) -> None:
        """Say that the queue is turned; it is, whenever a key is taken, done, or waited for in vain."""
        self.ticked_at = self._clock()

    def close(self) -> None:
        """Cancel every delay."""
        for key in list(self._delayed):
            self._cancel_delay(key)

    def _cancel_delay(self, key: K) -> None:
        due_and_handle = self._delayed.pop(key, None)
        if due_and_handle is not None:
            due_and_handle[1].cancel()
