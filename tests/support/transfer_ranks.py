"""Real children in one real group, for tests: what they are told and what they say."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from typing import TypeVar

from weightsync_contract.manifest import Manifest
from weightsync_engine.digest import digest_image
from weightsync_engine.transfer import protocol
from weightsync_engine.transfer.process import ChildProcess

T = TypeVar("T")

HOST = "127.0.0.1"
SECONDS = 30.0
MANIFEST = Manifest.from_lists(
    ["a", "nothing", "b"], ["float32", "float32", "uint8"], [[700_001], [0], [3 << 20]]
)
IMAGE = os.urandom(MANIFEST.nbytes)
DIGEST = digest_image(MANIFEST.layout, IMAGE)


class Rank:
    """A child and what it says."""

    def __init__(self, child: ChildProcess) -> None:
        self.child = child
        self.events = child.events()

    async def until(self, kind: type[T]) -> T:
        """The next event of a kind; a Failed that was not asked for is an error."""
        async with asyncio.timeout(SECONDS):
            async for event in self.events:
                if isinstance(event, kind):
                    return event
                assert not isinstance(event, protocol.Failed), event
        raise AssertionError(f"the child ended without {kind.__name__}")

    async def tell(self, command: protocol.Command, fd: int | None = None) -> None:
        await self.child.send(command, fd)


@contextlib.asynccontextmanager
async def ranks(
    count: int, nonce: str = "n", seconds: float = SECONDS, backend: str = "Gloo"
) -> AsyncIterator[list[Rank]]:
    """Children that have joined one group within ``seconds``, once they are warm."""
    children = [Rank(await ChildProcess.spawn()) for _ in range(count)]
    try:
        first, *others = children
        for each in children:
            await each.until(protocol.Started)
        await first.tell(protocol.Listen(HOST, 0, count, nonce, seconds, backend))
        endpoint = (await first.until(protocol.Listening)).endpoint
        for number, each in enumerate(others, 1):
            await each.tell(protocol.Join(endpoint, nonce, number, count, seconds, backend))
        for each in children:
            await each.until(protocol.Ready)
        yield children
    finally:
        for each in children:
            each.child.kill()
            await each.child.wait()


@contextlib.contextmanager
def memory(content: bytes | None = None, size: int = MANIFEST.nbytes) -> Iterator[int]:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        if content is not None:
            os.pwrite(fd, content, 0)
        yield fd
    finally:
        os.close(fd)


def send(**changes: object) -> protocol.Send:
    return protocol.Send(
        **{
            "nbytes": MANIFEST.nbytes,
            "layout": MANIFEST.layout,
            "buffer_bytes": 1 << 20,
            "num_buffers": 3,
            "seconds": SECONDS,
            **changes,
        }  # type: ignore[arg-type]
    )


def receive(**changes: object) -> protocol.Receive:
    return protocol.Receive(
        **{
            "nbytes": MANIFEST.nbytes,
            "layout": MANIFEST.layout,
            "buffer_bytes": 1 << 20,
            "num_buffers": 3,
            "seconds": SECONDS,
            **changes,
        }  # type: ignore[arg-type]
    )
