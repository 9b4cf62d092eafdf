"""Virtual time and seeded chance: whatever happens in a simulation happens again with the same seed."""

import heapq
import random
from collections.abc import Callable


class Clock:
    """Runs what was asked for, in the order of its time."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 1000.0
        self.events = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Do it then."""
        self._count += 1
        heapq.heappush(self._heap, (self.now + max(0.0, seconds), self._count, action))

    def soon(self, low: float, high: float, action: Callable[[], None]) -> None:
        """Do it some time between."""
        self.after(self.random.uniform(low, high), action)

    def chance(self, probability: float) -> bool:
        """Whether it happens this time."""
        return self.random.random() < probability

    def run(self, until: float, done: Callable[[], bool] | None = None) -> bool:
        """Let time pass; True once ``done`` holds, which is asked from time to time."""
        while self._heap and self._heap[0][0] <= until:
            at, _, action = heapq.heappop(self._heap)
            self.now = at
            self.events += 1
            action()
            if done is not None and self.events % 16 == 0 and done():
                return True
        self.now = until
        return done is not None and done()
