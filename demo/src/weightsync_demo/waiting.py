"""Waiting for a condition rather than for a time."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(
    predicate: Callable[[], T | None],
    timeout: float,
    what: str,
    *,
    ignoring: type[Exception] | tuple[type[Exception], ...] = (),
    interval: float = 0.05,
) -> T:
    """Call `predicate` every `interval` seconds until its answer is true, and return that answer.

    An exception in `ignoring` counts as "not yet"; any other passes through. The predicate is asked at least
    once, and once more after the deadline: a machine that stood still doesn't fail a condition that holds.

    Raises TimeoutError after `timeout` seconds, naming `what` was waited for and the last answer.
    """
    deadline = time.monotonic() + timeout
    while True:
        expired = time.monotonic() >= deadline
        try:
            value = predicate()
        except ignoring as error:
            last = f"last error {error!r}"
        else:
            if value:
                return value
            last = f"last value {value!r}"
        if expired:
            raise TimeoutError(f"waited {timeout:g} s for {what}: {last}")
        time.sleep(interval)
