"""The trainer's agent's copies of published versions: files that only the agent has ever opened.

A version is there once its description is: the image is complete by then. Files survive a restart of the agent;
what is half written at that moment is dropped. Only descriptions are flushed to the disk: a trainer does not wait
for its weights to get there, and a copy that a crash of the machine has torn is found by its digest, which is
taken again when a copy is opened for the first time after a restart.
"""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from weightsync_contract import logs
from weightsync_contract.codec import from_document, to_document
from weightsync_contract.manifest import Manifest, ManifestError
from weightsync_contract.messages import Published, VersionId
from weightsync_contract.reasons import PublishCode
from weightsync_engine.digest import ImageDigest

log = logs.get(__name__)

REMEMBERED: Final = 4096
"""Digests of a run that are kept beyond their copies, newest first: the same version with other bytes is found."""
RETAINED: Final = 2
"""How many versions are kept until the operator says it."""
_RESERVE_BYTES: Final = 16 << 20
_READ_BYTES: Final = 1 << 20


class VersionNotRetainedError(Exception):
    """There is no copy of the version, or it is damaged."""


@dataclass(frozen=True)
class StoredVersion:
    """An opened copy; ``fd`` reads the flat image."""

    fd: int
    manifest: Manifest
    published: Published


@dataclass
class _Entry:
    published: Published
    manifest: Manifest
    order: int
    verified: bool


class VersionStore:
    """Every method may be called from any thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._completed = directory / "completed"
        self._lock = threading.RLock()
        self._entries: dict[VersionId, _Entry] = {}
        self._digests: dict[VersionId, str] = {}
        self._pinned: dict[VersionId, int] = {}
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._recover()
        self._retained = RETAINED
        # Until it is said how many, none is dropped that an agent before this one kept: the fleet may serve it.
        self._recovered = frozenset(self._entries)

    def versions(self) -> tuple[Published, ...]:
        """What there is a copy of, in the order of publishing."""
        with self._lock:
            return tuple(entry.published for entry in self._sorted())

    def newest(self, run: str) -> int | None:
        """The highest version ever published in a run, whether or not it is still there."""
        with self._lock:
            return max((v.version for v in self._digests if v.run == run), default=None)

    @property
    def completed(self) -> bool:
        """Whether the trainer has said that it is done; outlives a restart."""
        return self._completed.exists()

    @completed.setter
    def completed(self, done: bool) -> None:
        if done:
            self._completed.touch()
        else:
            self._completed.unlink(missing_ok=True)

    def digest_of(self, version: VersionId) -> str | None:
        """What a version of before hashed to."""
        with self._lock:
            return self._digests.get(version)

    @contextmanager
    def open(self, version: VersionId) -> Iterator[StoredVersion]:
        """A copy to read; it is not dropped meanwhile. Raises VersionNotRetainedError."""
        self.pin(version)
        try:
            with self._lock:
                entry = self._entries.get(version)
            if entry is None:
                have = ", ".join(str(each.version) for each in self.versions()) or "none"
                raise VersionNotRetainedError(f"there is no copy of {version}; kept are {have}")
            fd = os.open(self._image(version), os.O_RDONLY | os.O_CLOEXEC)
            try:
                if not entry.verified:
                    self._verify(fd, entry)
                yield StoredVersion(fd, entry.manifest, entry.published)
            finally:
                os.close(fd)
        finally:
            self.unpin(version)

    def set_retained(self, count: int) -> None:
        """Keep so many versions."""
        with self._lock:
            self._retained = max(1, count)
            self._recovered = frozenset()
            self._evict()

    def pin(self, version: VersionId) -> None:
        """Do not drop it, until as many ``unpin``."""
        with self._lock:
            self._pinned[version] = self._pinned.get(version, 0) + 1

    def unpin(self, version: VersionId) -> None:
        """Take one ``pin`` back."""
        with self._lock:
            left = self._pinned.pop(version, 0) - 1
            if left > 0:
                self._pinned[version] = left
            self._evict()

    def begin(self, version: VersionId, manifest: Manifest) -> "Writing":
        """Make room for a new copy. Raises ManifestError with VERSION_NOT_GROWING, or NO_SPACE with numbers.

        A version of before is let in: whether its bytes are those of before shows at the end.
        """
        self._check_grows(version)
        free = shutil.disk_usage(self._directory).free
        if free < manifest.nbytes + _RESERVE_BYTES:
            raise ManifestError(
                PublishCode.NO_SPACE,
                f"the copy takes {manifest.nbytes:,} bytes and {self._directory} has {free:,} free: give the "
                "volume more room, or lower spec.trainer.retainedVersions",
            )
        try:
            return Writing(self, version, manifest, self._directory / f".writing-{os.urandom(8).hex()}")
        except OSError as error:
            raise ManifestError(
                PublishCode.NO_SPACE,
                f"no room for a copy of {manifest.nbytes:,} bytes in {self._directory}: {error}",
            ) from error

    def _check_grows(self, version: VersionId) -> None:
        newest = self.newest(version.run)
        if newest is not None and version.version <= newest and self.digest_of(version) is None:
            raise ManifestError(
                PublishCode.VERSION_NOT_GROWING,
                f"{version}: the run is at version {newest} already: give a higher one, or a new run after a "
                "restart from a checkpoint",
            )

    def _accept(self, path: Path, published: Published, manifest: Manifest) -> None:
        """Take a complete image in, or drop it when it changes nothing. Raises ManifestError."""
        version = published.version
        with self._lock:
            self._check_grows(version)
            before = self._digests.get(version)
            if before is not None and before != published.digest:
                raise ManifestError(
                    PublishCode.VERSION_CONFLICT,
                    f"{version} was published before with other bytes ({before}, now {published.digest}): give "
                    "changed weights a new version, or a new run after a restart from a checkpoint",
                )
            if before is not None and version != next(reversed(self._digests)):
                # An old one again: it must not come to stand before what followed it.
                return
            if version in self._entries:
                return
            order = max((entry.order for entry in self._entries.values()), default=0) + 1
            path.rename(self._image(version))
            document = {
                "published": to_document(published),
                "order": order,
                "tensors": manifest.encode().decode(),
            }
            try:
                self._write(self._description(version), document)
                self._remember(published)
            except OSError:
                self._drop(version)
                raise
            self._entries[version] = _Entry(published, manifest, order, verified=True)
            self._evict()

    # ---------------------------------------------------------------------------------------- the directory

    def _image(self, version: VersionId) -> Path:
        return self._directory / f"{version.run}@{version.version}.image"

    def _description(self, version: VersionId) -> Path:
        return self._directory / f"{version.run}@{version.version}.json"

    def _write(self, path: Path, document: Any) -> None:
        new = path.with_name(f".writing-{path.name}")
        try:
            with new.open("w") as file:
                json.dump(document, file)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        except OSError:
            new.unlink(missing_ok=True)
            raise
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _remember(self, published: Published) -> None:
        digests = {**self._digests, published.version: published.digest}
        while len(digests) > REMEMBERED:
            del digests[next(iter(digests))]
        self._write(
            self._directory / "digests", [[v.run, v.version, digest] for v, digest in digests.items()]
        )
        self._digests = digests

    def _recover(self) -> None:
        for path in self._directory.glob(".writing-*"):
            path.unlink()
        with suppress(OSError, ValueError, TypeError):
            rows = json.loads((self._directory / "digests").read_text())
            self._digests = {VersionId(str(run), int(version)): str(digest) for run, version, digest in rows}
        found: list[_Entry] = []
        for path in self._directory.glob("*@*.json"):
            try:
                document = json.loads(path.read_text())
                published = from_document(Published, document["published"])
                manifest = Manifest.decode(document["tensors"])
                whole = self._image(published.version).stat().st_size == manifest.nbytes
                entry = _Entry(published, manifest, int(document["order"]), verified=False)
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("copy not readable, dropped", path=path, why=error)
                path.unlink()
                continue
            if whole:
                found.append(entry)
            else:
                log.warning("copy not whole, dropped", version=published.version)
                path.unlink()
        for entry in sorted(found, key=lambda entry: entry.order):
            self._entries[entry.published.version] = entry
            self._digests.setdefault(entry.published.version, entry.published.digest)
        for image in self._directory.glob("*@*.image"):
            if not image.with_suffix(".json").exists():
                image.unlink()

    def _verify(self, fd: int, entry: _Entry) -> None:
        digest = ImageDigest(entry.published.layout)
        offset = 0
        while data := os.pread(fd, _READ_BYTES, offset):
            digest.update(data)
            offset += len(data)
        if digest.value() != entry.published.digest:
            with self._lock:
                self._drop(entry.published.version)
            raise VersionNotRetainedError(f"the copy of {entry.published.version} is damaged and was dropped")
        entry.verified = True

    def _sorted(self) -> list[_Entry]:
        return sorted(self._entries.values(), key=lambda entry: entry.order)

    def _evict(self) -> None:
        """Keep the newest; of an older run only while the newer one has not filled its share."""
        entries = self._sorted()
        if not entries:
            return
        for entry in entries[: max(0, len(entries) - self._retained)]:
            version = entry.published.version
            if version not in self._pinned and version not in self._recovered:
                self._drop(version)

    def _drop(self, version: VersionId) -> None:
        self._entries.pop(version, None)
        # The description first: an image without one is no version.
        self._description(version).unlink(missing_ok=True)
        self._image(version).unlink(missing_ok=True)


class Writing:
    """A copy that is being made. It is none until ``seal``; ``abort`` leaves nothing behind."""

    def __init__(self, store: VersionStore, version: VersionId, manifest: Manifest, path: Path) -> None:
        self._store, self._version, self._manifest, self._path = store, version, manifest, path
        self._digest = ImageDigest(manifest.layout)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self.written = 0
        try:
            # A full volume shows here, not in the middle.
            os.posix_fallocate(self._fd, 0, max(manifest.nbytes, 1))
            os.ftruncate(self._fd, manifest.nbytes)
        except OSError:
            self.abort()
            raise

    def write(self, data: memoryview) -> None:
        """Take the next bytes of the flat image, which nobody may change meanwhile. Raises OSError."""
        self._digest.update(data)
        at = 0
        while at < len(data):
            at += os.pwrite(self._fd, data[at:], self.written + at)
        self.written += len(data)

    def seal(self) -> Published:
        """The copy is complete; what the store holds of the version now, or held when it is older than others.

        Raises ManifestError with VERSION_CONFLICT when the version had other bytes before, and OSError; the copy
        is dropped then.
        """
        published = Published(
            self._version,
            self._manifest.layout,
            self._digest.value(),
            self._manifest.nbytes,
            len(self._manifest.tensors),
        )
        try:
            self._store._accept(self._path, published, self._manifest)
        finally:
            self.abort()
        return published

    def abort(self) -> None:
        """Drop what was not taken in; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._path.unlink(missing_ok=True)
