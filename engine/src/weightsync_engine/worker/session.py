"""One rank's part in an update, between the engine's calls and the agent's socket.

An expected refusal is never raised: once a rank has raised, vLLM with several ranks gives every later call
the answer to the one before. What came of an update is read from the socket.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from weightsync_contract import logs
from weightsync_contract.manifest import Manifest
from weightsync_contract.messages import VersionId
from weightsync_engine.worker.protocol import Image, Problem
from weightsync_engine.worker.state import Attached, RefusedError, WorkerState
from weightsync_engine.worker.tensors import views

log = logs.get(__name__)

Load = Callable[[Iterable[tuple[str, torch.Tensor]]], None]
Check = Callable[[Manifest], tuple[Problem, ...]]


class UpdateSession:
    """Called from the engine's own thread, in order: start, receive, begin, complete."""

    def __init__(self, state: WorkerState, check: Check, load: Load) -> None:
        self._state = state
        self._check = check
        self._load = load
        self._wanted: Image | None = None
        self._begun: Attached | None = None
        self._refusal = ""

    def preflight(self, layout: str) -> None:
        """Check the kept manifest of ``layout``; the result is in the status."""
        manifest = self._state.manifest(layout)
        if manifest is None:
            problem = Problem("manifest", f"{layout} is not here", "send it over the worker's socket first")
            self._state.checked(layout, (problem,))
            return
        try:
            problems = self._check(manifest)
        except Exception as error:
            log.exception("preflight failed", layout=layout)
            what = f"the check itself failed: {error!r:.300}"
            problems = (Problem("manifest", what, "see the engine's log"),)
        self._state.checked(layout, problems)

    def start(self) -> None:
        """Forget what the update before wanted, and why it failed."""
        self._wanted = None
        self._state.refuse("")

    def receive(self, image: Image) -> None:
        """Name the image that the next finish applies."""
        self._wanted = image

    def begin(self) -> bool:
        """Reserve the image. True if this rank can apply it; then ``complete`` must follow."""
        self._begun, self._refusal = None, ""
        wanted, self._wanted = self._wanted, None
        if wanted is None:
            self._refusal = "finished without an update"
            return False
        try:
            self._begun = self._state.begin(wanted)
        except RefusedError as error:
            self._refusal = str(error)
        return self._begun is not None

    def complete(self, agreed: bool) -> None:
        """Apply if all ranks can (``agreed``), else let go. Never raises: a failure is in the status."""
        begun, self._begun = self._begun, None
        if begun is None:
            log.warning("update refused", why=self._refusal)
            self._state.refuse(self._refusal)
        elif not agreed:
            self._state.end(None, "another rank refused the update")
        else:
            self._apply(begun)

    def _apply(self, begun: Attached) -> None:
        self._state.touching()
        try:
            with torch.no_grad():
                self._load(views(begun))
        except Exception as error:
            log.exception("update failed, the weights may be mixed", image=begun.image)
            self._state.end(None, f"failed when parameters had been touched: {error!r:.500}")
        else:
            self._state.end(begun.image)


def image_of(info: dict[str, Any]) -> Image:
    """The image that an update names: run, version, layout, digest. Raises ValueError."""
    match info:
        case {"run": str(run), "version": int(version), "layout": str(layout), "digest": str(digest)}:
            return Image(VersionId(run, version), layout, digest)
    raise ValueError("update_info has run, version, layout and digest")
