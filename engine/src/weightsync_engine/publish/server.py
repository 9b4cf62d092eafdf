"""The trainer's agent's side of publishing: checks at the border, copies, and tells what became of a version.

A thread a connection: each waits for one trainer, and copying and hashing leave the interpreter free. Nothing
of a publish is kept before its last byte was hashed and is durable.
"""

import asyncio
import fcntl
import json
import mmap
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
from weightsync_contract.messages import Fleet, Source, VersionId
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
SLOT_BYTES: Final = 4 << 20
IDLE_SECONDS: Final = 30.0
"""A trainer that says nothing for so long in the middle of a publish has stalled."""
ANSWER_SECONDS: Final = 10.0
WAIT_SECONDS: Final = 86400.0
_SIZE_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class PublishServer:
    """Listens at a Unix socket for trainers of this pod. Made and used in one event loop."""

    def __init__(self, path: Path, store: VersionStore) -> None:
        self._path = path
        self._store = store
        self.on_change: Callable[[], None] = lambda: None
        self._lock = threading.Condition()
        self._fleet: Fleet | None = None
        self._channels: set[Channel] = set()
        self._threads: set[threading.Thread] = set()
        self._publisher: _Publisher | None = None
        self._completed = False
        self._closed = False
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
            self._closed = True
            channels, threads = list(self._channels), list(self._threads)
            self._lock.notify_all()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._path.unlink(missing_ok=True)
        for channel in channels:
            channel.interrupt()
        for thread in threads:
            await asyncio.to_thread(thread.join, ANSWER_SECONDS)

    def source(self) -> Source:
        """What the agent tells the operator of publishing."""
        versions = self._store.versions()
        with self._lock:
            return Source(
                run=versions[-1].version.run if versions else "",
                connected=self._publisher is not None,
                versions=versions,
                completed=self._completed,
            )

    def tell(self, fleet: Fleet) -> None:
        """How the fleet stands now: answers those who wait."""
        with self._lock:
            self._fleet = fleet
            self._lock.notify_all()

    # ------------------------------------------------------------------------------------------- connections

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            channel = Channel(connection, FROM_CLIENT)
            thread = threading.Thread(target=self._serve, args=(channel,), daemon=True)
            with self._lock:
                if self._closed:
                    channel.close()
                    return
                self._channels.add(channel)
                self._threads.add(thread)
            thread.start()

    def _serve(self, channel: Channel) -> None:
        try:
            channel.send(Greeting(PROTOCOL), Deadline(ANSWER_SECONDS))
            while True:
                message = channel.receive(NEVER)
                match message:
                    case Begin():
                        self._publish(channel, message)
                    case Wait():
                        channel.send(self._wait(message.version), Deadline(ANSWER_SECONDS))
                    case Goodbye():
                        self._goodbye(channel)
                    case _:
                        raise MalformedError(f"{type(message).__name__} has no place here")
        except MalformedError as error:
            log.warning("malformed publish", why=error)
            with suppress(OSError, ConnectionError):
                channel.send(Refused(PublishCode.MALFORMED, str(error)), Deadline(ANSWER_SECONDS))
        except (ChannelClosedError, TimeoutError) as error:
            log.debug("publish connection ended", why=error)
        except Exception as error:
            log.exception("publish connection failed")
            with suppress(OSError, ConnectionError):
                channel.send(Broken(f"the agent failed: {error!r}"), Deadline(ANSWER_SECONDS))
        finally:
            self._gone(channel)

    def _gone(self, channel: Channel) -> None:
        with self._lock:
            channel.close()
            self._channels.discard(channel)
            self._threads.discard(threading.current_thread())
            lost = self._publisher is not None and self._publisher.channel is channel
            if lost:
                self._publisher = None
        if lost:
            log.info("publisher gone", completed=self._completed)
            self._changed()

    def _goodbye(self, channel: Channel) -> None:
        with self._lock:
            mine = self._publisher is not None and self._publisher.channel is channel
            self._completed = self._completed or mine

    def _changed(self) -> None:
        with suppress(RuntimeError):
            # The loop may have ended already: nobody is there to be told then.
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self.on_change)

    def _wait(self, version: VersionId) -> Settled:
        def found() -> Settled | None:
            if self._closed:
                return Settled(PublishOutcome.PENDING, "", "the agent ends")
            return settled(version, self._fleet)

        with self._lock:
            answer = self._lock.wait_for(found, WAIT_SECONDS)
        return answer or Settled(PublishOutcome.PENDING)

    # ------------------------------------------------------------------------------------------------ publish

    def _publish(self, channel: Channel, begin: Begin) -> None:
        if not 0 <= begin.description_bytes <= MAX_DESCRIPTION_BYTES:
            raise MalformedError(f"a description of {begin.description_bytes} bytes")
        data = channel.receive_bytes(begin.description_bytes, Deadline(IDLE_SECONDS))
        try:
            version = checked_version(begin.run, begin.version)
            manifest = _manifest(data)
            self._admit(channel, begin, version)
            writing = self._store.begin(version, manifest)
        except ManifestError as error:
            log.warning("publish refused", version=f"{begin.run}/{begin.version}", code=error.code, why=error)
            channel.send(Refused(error.code, str(error)), Deadline(ANSWER_SECONDS))
            return
        try:
            self._receive(channel, manifest, writing)
            published = writing.seal()
        except ManifestError as error:
            log.warning("publish refused", version=version, code=error.code, why=error)
            channel.send(Refused(error.code, str(error)), Deadline(ANSWER_SECONDS))
            return
        finally:
            writing.abort()
        log.info("published", version=version, bytes=manifest.nbytes, tensors=len(manifest.tensors))
        self._changed()
        channel.send(Accepted(published.digest), Deadline(ANSWER_SECONDS))

    def _admit(self, channel: Channel, begin: Begin, version: VersionId) -> None:
        """One trainer process publishes; its versions grow."""
        with self._lock:
            now = self._publisher
            if now is not None and now.process != begin.process and now.channel.alive:
                raise ManifestError(
                    PublishCode.ANOTHER_PUBLISHER,
                    f"process {now.pid} publishes here already: let one process (rank 0) publish, or end that one",
                )
            newest = self._store.newest(version.run)
            known = self._store.digest_of(version) is not None
            if newest is not None and version.version <= newest and not known:
                raise ManifestError(
                    PublishCode.VERSION_NOT_GROWING,
                    f"{version}: the run is at version {newest} already: give a higher one, or a new run after a "
                    "restart from a checkpoint",
                )
            self._publisher = _Publisher(begin.process, channel.peer_pid or begin.pid, channel)
            self._completed = False
        self._changed()

    def _receive(self, channel: Channel, manifest: Manifest, writing: Writing) -> None:
        fd = os.memfd_create("weightsync-publish", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, SLOTS * SLOT_BYTES)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_SEALS)
            with mmap.mmap(fd, SLOTS * SLOT_BYTES, prot=mmap.PROT_READ) as memory, memoryview(memory) as view:
                channel.send(Ready(manifest.nbytes, SLOTS, SLOT_BYTES), Deadline(ANSWER_SECONDS), fd)
                self._copy(channel, manifest, writing, view)
        finally:
            os.close(fd)

    def _copy(self, channel: Channel, manifest: Manifest, writing: Writing, view: memoryview) -> None:
        slot = 0
        while True:
            message = channel.receive(Deadline(IDLE_SECONDS))
            match message:
                case Filled(count) if 0 < count <= min(SLOT_BYTES, manifest.nbytes - writing.written):
                    start = slot * SLOT_BYTES
                    # A copy of our own first: what is hashed and stored can't change under us.
                    writing.write(memoryview(bytes(view[start : start + count])))
                    slot = (slot + 1) % SLOTS
                    channel.send(Taken(), Deadline(IDLE_SECONDS))
                case Seal() if writing.written == manifest.nbytes:
                    return
                case _:
                    raise MalformedError(
                        f"{message} after {writing.written} of {manifest.nbytes} bytes: not what comes next"
                    )


class _Publisher:
    """The trainer process that publishes, as long as its connection lives."""

    def __init__(self, process: str, pid: int, channel: Channel) -> None:
        self.process, self.pid, self.channel = process, pid, channel


def _manifest(data: bytes) -> Manifest:
    try:
        document: Any = json.loads(data)
        described = from_document(Description, document)
    except (ValueError, RecursionError) as error:
        raise ManifestError(PublishCode.MALFORMED, f"the description of the tensors: {error}") from error
    return Manifest.from_lists(described.names, described.dtype_names, described.shapes)
