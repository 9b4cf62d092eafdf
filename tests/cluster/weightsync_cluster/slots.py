"""Which cluster a test run takes for its own, when several run on one machine, and when one was killed."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from weightsync_cluster.errors import ClusterError
from weightsync_cluster.place import Place
from weightsync_demo.kube.locking import exclusive

SLOTS = 8


@contextmanager
def own_place(prefix: str) -> Iterator[Place]:
    """A place, empty, that no other process is given before the block or this process ends.

    What runs that were killed have left in other places is removed too. Raises ClusterError where all are
    taken.
    """
    with ExitStack() as kept:
        own = None
        for number in range(1, SLOTS + 1):
            place = Place(f"{prefix}-{number}")
            if own is not None and not place.directory.exists():
                continue
            with ExitStack() as stack:
                # Held by the kernel for as long as this process lives, and no longer.
                place.directory.parent.mkdir(parents=True, exist_ok=True)
                lock = place.directory.with_suffix(".owner")
                try:
                    stack.enter_context(exclusive(lock, 0, lambda: None))
                except TimeoutError:
                    continue
                with place.alone(print):
                    place.clear()
                if own is None:
                    own = place
                    kept.push(stack.pop_all())
        if own is None:
            raise ClusterError(
                f"{SLOTS} test runs have a cluster on this machine: wait for one of them to end"
            )
        yield own
