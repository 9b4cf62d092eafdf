"""What a rank knows, shared by its socket's thread and the engine's own: manifest, image, what is applied."""

import fcntl
import mmap
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsync_contract.manifest import Manifest, ManifestError
from weightsync_engine.worker.protocol import SEALS, Hello, Image, Preflight, Problem, WorkerStatus

if TYPE_CHECKING:
    from torch import Tensor

    from weightsync_engine.worker.arena import Arena


class RefusedError(Exception):
    """What was asked can't be done as things are; the message says why. Nothing has changed."""


@dataclass(frozen=True)
class Attached:
    """An image in this process's memory: mapped, or in its arena on the GPU.

    The mapping is private: it reads the sealed pages themselves, and a loader that changes in place what it
    is given changes a copy of its own.
    """

    image: Image
    manifest: Manifest
    memory: "mmap.mmap | Tensor"


class WorkerState:
    """Every method may be called from any thread. Raises RefusedError where it says no."""

    def __init__(self, hello: Hello, arena: "Arena | None" = None) -> None:
        self.hello = hello
        self._arena = arena
        self._lock = threading.Lock()
        self._manifest: Manifest | None = None
        self._preflight: Preflight | None = None
        self._attached: Attached | None = None
        self._applied: Image | None = None
        self._busy = False
        self._clean = True
        self._error = ""

    # ------------------------------------------------------------------------- asked by the agent

    def status(self) -> WorkerStatus:
        """All of it at one moment."""
        with self._lock:
            return WorkerStatus(
                self.hello,
                self._manifest.layout if self._manifest else "",
                self._preflight,
                self._attached.image if self._attached else None,
                self._applied,
                self._error,
                self._clean,
            )

    def keep_manifest(self, layout: str, data: str) -> None:
        """Keep a manifest for preflight and apply. Refused when malformed or not the one that was named."""
        try:
            manifest = Manifest.decode(data)
        except ManifestError as error:
            raise RefusedError(f"malformed manifest: {error}") from error
        if manifest.layout != layout:
            raise RefusedError(f"the manifest has layout {manifest.layout}, not {layout}")
        with self._lock:
            if self._manifest is None or self._manifest.layout != layout:
                self._manifest, self._preflight = manifest, None

    def arena(self, nbytes: int) -> int:
        """A descriptor, this state's own, of device memory to receive ``nbytes`` into.

        Refused where there is none, or not so much, and while an image in it is attached.
        """
        with self._lock:
            if self._arena is None:
                raise RefusedError(
                    "this engine keeps no arena for dataPlane.staging Device: start it with WEIGHTSYNC_ARENA=auto"
                )
            if nbytes > self._arena.nbytes:
                raise RefusedError(
                    f"the engine's arena has {self._arena.nbytes} bytes, and the version {nbytes}: "
                    f"start the engine with WEIGHTSYNC_ARENA={nbytes} or more"
                )
            if self._attached is not None:
                raise RefusedError(f"{self._attached.image} is attached")
            return self._arena.fd

    def attach(self, image: Image, nbytes: int, fd: int) -> None:
        """Map staged memory. Refused unless it is sealed, of the kept manifest's layout and of its size.

        ``fd`` stays the caller's.
        """
        with self._lock:
            if self._busy:
                raise RefusedError("an update is being applied")
            manifest = self._manifest
            if manifest is None or manifest.layout != image.layout:
                kept = manifest.layout if manifest else "none"
                raise RefusedError(f"the kept manifest is {kept}, not {image.layout}: send it first")
            if nbytes != manifest.nbytes:
                raise RefusedError(f"{nbytes} bytes, but the manifest's image has {manifest.nbytes}")
            if self._arena is not None and self._arena.is_place(fd):
                self._attached = Attached(image, manifest, self._arena.image(nbytes))
            else:
                self._attached = Attached(image, manifest, _map(fd, nbytes))
            self._error = ""

    def drop(self) -> None:
        """Let go of what is attached. Refused while it is being applied."""
        with self._lock:
            if self._busy:
                raise RefusedError("an update is being applied")
            self._attached = None

    # ------------------------------------------------------------------------ asked by the engine

    def manifest(self, layout: str) -> Manifest | None:
        """The kept manifest, if it is the one of ``layout``."""
        with self._lock:
            return self._manifest if self._manifest and self._manifest.layout == layout else None

    def checked(self, layout: str, problems: tuple[Problem, ...]) -> None:
        """Tell what a preflight found."""
        with self._lock:
            self._preflight = Preflight(layout, problems)

    def begin(self, image: Image) -> Attached:
        """Take what is attached for applying it; from here to ``end`` nobody can attach or drop.

        Refused unless it is this image and its preflight found nothing.
        """
        with self._lock:
            if self._busy:
                raise RefusedError("an update is being applied already")
            if not self._clean:
                raise RefusedError("the weights may be mixed: the engine has to be restarted")
            if self._attached is None:
                raise RefusedError("no image is attached")
            found = self._attached.image
            if found != image:
                raise RefusedError(f"attached is {found}, not {image}")
            checked = self._preflight
            if checked is None or checked.layout != image.layout:
                raise RefusedError(f"the manifest {image.layout} has not been checked")
            if checked.problems:
                raise RefusedError(f"the manifest was refused: {checked.problems[0]}")
            self._busy = True
            return self._attached

    def touching(self) -> None:
        """Say that the first parameter is about to change."""
        with self._lock:
            self._clean, self._applied = False, None

    def end(self, applied: Image | None, error: str = "") -> None:
        """Tell how it ended and let go of the image; without ``applied`` the weights are as said before."""
        with self._lock:
            self._busy, self._attached, self._error = False, None, error
            if applied:
                self._applied, self._clean = applied, True

    def refuse(self, error: str) -> None:
        """Tell why an update came to nothing; what is attached stays."""
        with self._lock:
            self._error = error


def _map(fd: int, nbytes: int) -> mmap.mmap:
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise RefusedError(f"the descriptor is no memory that can be sealed ({error.strerror})") from error
    if seals & SEALS != SEALS:
        raise RefusedError(
            "the memory is not sealed against writing and resizing: its bytes could still change"
        )
    size = os.fstat(fd).st_size
    if size != nbytes:
        raise RefusedError(f"the memory has {size} bytes, not {nbytes}")
    try:
        return mmap.mmap(fd, nbytes, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise RefusedError(f"the memory can't be mapped: {error}") from error
