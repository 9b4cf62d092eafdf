"""The trainer's agent's side of publishing: checks at the border, copies, and tells what became of a version.

A thread a connection: each waits for one trainer, and copying and hashing leave the interpreter free. Nothing
of a publish is kept before its last byte was hashed.
"""

import asyncio
import fcntl
import json
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from weightsync_contract import logs
from weightsync_contract.codec import MalformedError, from_document
from weightsync_contract.manifest import Manifest, ManifestError
from weightsync_contract.messages import Fleet, Published, Source, VersionId
from weightsync_contract.reasons import PublishCode
from weightsync_engine.publish.channel import NEVER, Channel, ChannelClosedError, Deadline
from weightsync_engine.publish.outcome import settled
from weightsync_engine.publish.protocol import (
    FROM_CLIENT,
    MAX_DESCRIPTION_BYTES,
    PROTOCOL,
    Accepted,
    Begin,
    Broken,
    Description,
    Filled,
    Goodbye,
    Greeting,
    PublishOutcome,
    Ready,
    Refused,
    Seal,
    Settled,
    Taken,
    Wait,
    checked_version,
)
from weightsync_engine.publish.store import VersionStore, Writing
from weightsync_engine.worker.sockets import short_name

log = logs.get(__name__)

SLOTS: Final = 4
SLOT_BYTES: Final = 1 << 20
IDLE_SECONDS: Final = 30.0
"""A trainer that says nothing for so long in the middle of a publish has stalled."""
ANSWER_SECONDS: Final = 10.0
MAX_CONNECTIONS: Final = 64
_RETRY_SECONDS: Final = 0.1
_SIZE_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class PublishServer:
    """Listens at a Unix socket for trainers of this pod. Made and used in one event loop."""

    def __init__(self, path: Path, store: VersionStore) -> None:
        self._path = path
        self._store = store
        self.on_change: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._fleet: Fleet | None = None
        self._threads: dict[Channel, threading.Thread] = {}
        self._waiting: dict[Channel, VersionId] = {}
        self._publisher: _Publisher | None = None
        self._closed = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)

    async def start(self) -> None:
        """Listen. Raises OSError."""
        self._loop = asyncio.get_running_loop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: whoever finds the socket finds it listening.
        new = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        new.unlink(missing_ok=True)
        with short_name(new) as address:
            self._listener.bind(address)
        new.chmod(0o600)
        self._listener.listen(16)
        new.replace(self._path)
        threading.Thread(target=self._accept, name="publish", daemon=True).start()

    async def close(self) -> None:
        """End every connection; a publish in the middle leaves nothing behind."""
        with self._lock:
            self._closed.set()
            threads = dict(self._threads)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._path.unlink(missing_ok=True)
        for channel in threads:
            channel.interrupt()
        for thread in threads.values():
            await asyncio.to_thread(thread.join, ANSWER_SECONDS)

    def source(self) -> Source:
        """What the agent tells the operator of publishing.

        ``connected`` after a restart of the agent: once the trainer publishes again. ``completed``: the process
        that published last has said so at its end.
        """
        versions = self._store.versions()
        with self._lock:
            return Source(
                run=versions[-1].version.run if versions else "",
                connected=self._publisher is not None and self._publisher.published,
                versions=versions,
                completed=self._store.completed,
            )

    def tell(self, fleet: Fleet) -> None:
        """How the fleet stands now: answers those who wait."""
        with self._lock:
            self._fleet = fleet
            for channel in tuple(self._waiting):
                self._settle(channel)

    # ------------------------------------------------------------------------------------------- connections

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if not self._closed.is_set():
                    # Out of descriptors, say: nothing to wait for but time.
                    log.warning("no publish connection accepted", why=error)
                    self._closed.wait(_RETRY_SECONDS)
                continue
            channel = Channel(connection, FROM_CLIENT)
            thread = threading.Thread(target=self._serve, args=(channel,), name="publisher", daemon=True)
            with self._lock:
                if not self._closed.is_set() and len(self._threads) < MAX_CONNECTIONS:
                    self._threads[channel] = thread
                    thread.start()
                else:
                    channel.close()

    def _serve(self, channel: Channel) -> None:
        try:
            channel.send(Greeting(PROTOCOL), Deadline(ANSWER_SECONDS))
            while True:
                message = channel.receive(NEVER)
                match message:
                    case Begin():
                        self._publish(channel, message)
                    case Wait():
                        with self._lock:
                            self._waiting[channel] = message.version
                            self._settle(channel)
                    case Goodbye():
                        self._goodbye(channel)
                    case _:
                        raise MalformedError(f"{type(message).__name__} has no place here")
        except MalformedError as error:
            log.warning("malformed publish", why=error)
            _last_word(channel, Refused(PublishCode.MALFORMED, str(error)))
        except ChannelClosedError as error:
            log.debug("publish connection ended", why=error)
        except TimeoutError as error:
            log.warning("publisher stalled", why=error)
            _last_word(channel, Broken(f"in the middle of a publish {error}"))
        except Exception as error:
            log.exception("publish connection failed")
            _last_word(channel, Broken(f"the agent failed: {error!r}"))
        finally:
            self._gone(channel)

    def _gone(self, channel: Channel) -> None:
        with self._lock:
            channel.close()
            self._threads.pop(channel, None)
            self._waiting.pop(channel, None)
            mine = self._mine(channel)
            if mine:
                self._publisher = None
        if mine:
            log.info("publisher gone", pid=mine.pid)
            self._changed()

    def _goodbye(self, channel: Channel) -> None:
        with self._lock:
            mine = self._mine(channel)
            if mine and mine.published:
                self._store.completed = True

    def _mine(self, channel: Channel) -> "_Publisher | None":
        return self._publisher if self._publisher and self._publisher.channel is channel else None

    def _changed(self) -> None:
        with suppress(RuntimeError):
            # The loop may have ended already: nobody is there to be told then.
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self.on_change)

    def _settle(self, channel: Channel) -> None:
        """Answer one who waits, if that is possible by now. Its thread goes on listening: it may go away."""
        version = self._waiting[channel]
        if self._store.digest_of(version) is None:
            why = f"the agent knows nothing of {version}: its state directory was lost"
            answer: Settled | None = Settled(PublishOutcome.FAILED, "VersionNotRetained", why)
        else:
            answer = settled(version, self._fleet)
        if answer is not None:
            del self._waiting[channel]
            with suppress(ChannelClosedError, TimeoutError):
                # Room for one line is there, if the other end reads at all.
                channel.send(answer, Deadline(_RETRY_SECONDS))

    # ------------------------------------------------------------------------------------------------ publish

    def _publish(self, channel: Channel, begin: Begin) -> None:
        if not 0 <= begin.description_bytes <= MAX_DESCRIPTION_BYTES:
            raise MalformedError(f"a description of {begin.description_bytes} bytes")
        data = channel.receive_bytes(begin.description_bytes, Deadline(IDLE_SECONDS))
        try:
            version = checked_version(begin.run, begin.version)
            manifest = _manifest(data)
            self._claim(channel, begin)
            published = self._take(channel, version, manifest)
        except ManifestError as error:
            log.warning("publish refused", version=f"{begin.run}/{begin.version}", code=error.code, why=error)
            self._unclaim(channel)
            channel.send(Refused(error.code, str(error)), Deadline(ANSWER_SECONDS))
            return
        with self._lock:
            mine = self._mine(channel)
            if mine:
                mine.published = True
                self._store.completed = False
        log.info("published", version=version, bytes=manifest.nbytes, tensors=len(manifest.tensors))
        self._changed()
        channel.send(Accepted(published.digest), Deadline(ANSWER_SECONDS))

    def _claim(self, channel: Channel, begin: Begin) -> None:
        """One process publishes, as long as it lives."""
        with self._lock:
            now = self._publisher
            same = now is not None and now.process == begin.process
            if now is not None and not same and now.channel.alive:
                raise ManifestError(
                    PublishCode.ANOTHER_PUBLISHER,
                    f"process {now.pid} publishes here already: let one process (rank 0) publish, or end that one",
                )
            pid = channel.peer_pid or begin.pid
            published = now is not None and same and now.published
            self._publisher = _Publisher(begin.process, pid, channel, published)

    def _unclaim(self, channel: Channel) -> None:
        with self._lock:
            mine = self._mine(channel)
            if mine and not mine.published:
                self._publisher = None

    def _take(self, channel: Channel, version: VersionId, manifest: Manifest) -> Published:
        writing = self._store.begin(version, manifest)
        try:
            fd = os.memfd_create("weightsync-publish", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.ftruncate(fd, SLOTS * SLOT_BYTES)
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_SEALS)
                channel.send(Ready(manifest.nbytes, SLOTS, SLOT_BYTES), Deadline(ANSWER_SECONDS), fd)
                _copy(channel, manifest, writing, fd)
            finally:
                os.close(fd)
            return writing.seal()
        finally:
            writing.abort()


def _copy(channel: Channel, manifest: Manifest, writing: Writing, fd: int) -> None:
    # Out of the slots first: what is hashed and stored can't change under us.
    own = memoryview(bytearray(SLOT_BYTES))
    slot = 0
    while True:
        message = channel.receive(Deadline(IDLE_SECONDS))
        match message:
            case Filled(count) if 0 < count <= min(SLOT_BYTES, manifest.nbytes - writing.written):
                os.preadv(fd, [own[:count]], slot * SLOT_BYTES)
                writing.write(own[:count])
                slot = (slot + 1) % SLOTS
                channel.send(Taken(), Deadline(IDLE_SECONDS))
            case Seal() if writing.written == manifest.nbytes:
                return
            case _:
                raise MalformedError(
                    f"{message} after {writing.written} of {manifest.nbytes} bytes: not what comes next"
                )


def _last_word(channel: Channel, message: Refused | Broken) -> None:
    with suppress(ChannelClosedError, TimeoutError):
        channel.send(message, Deadline(ANSWER_SECONDS))


class _Publisher:
    """The trainer process that publishes, as long as its connection lives."""

    def __init__(self, process: str, pid: int, channel: Channel, published: bool) -> None:
        self.process, self.pid, self.channel, self.published = process, pid, channel, published


def _manifest(data: bytes) -> Manifest:
    try:
        document: Any = json.loads(data)
        described = from_document(Description, document)
    except (ValueError, RecursionError) as error:
        raise ManifestError(PublishCode.MALFORMED, f"the description of the tensors: {error}") from error
    return Manifest.from_lists(described.names, described.dtype_names, described.shapes)
