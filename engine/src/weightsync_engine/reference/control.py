"""What vLLM's control routes do, on the reference engine: pause, and the update of all ranks at once."""

from typing import Any

from weightsync_engine.reference.core import Core, Paused
from weightsync_engine.worker.session import UpdateSession, image_of
from weightsync_engine.worker.state import WorkerState

MODES = ("abort", "wait", "keep")


class EngineError(Exception):
    """What vLLM answers with 500."""


class Control:
    """Every method runs on the core's thread (``Core.call``), one at a time, as an executor's calls do.

    Ranks share one set of weights: the first one loads, all tell.
    """

    def __init__(self, core: Core, ranks: list[WorkerState]) -> None:
        self._core = core
        model = core.model
        loads = [model.load, *([lambda tensors: None] * (len(ranks) - 1))]
        self._sessions = [
            UpdateSession(state, model.check, load) for state, load in zip(ranks, loads, strict=True)
        ]
        self._active = False
        self.weight_version = "default"

    def is_paused(self) -> bool:
        """Does any pause hold?"""
        return self._core.paused is not Paused.NO

    def init(self, info: dict[str, Any]) -> None:
        """Check the manifest that the ranks keep."""
        layout = info.get("layout")
        if not isinstance(layout, str):
            raise EngineError("Invalid init_info: layout is missing")
        for session in self._sessions:
            session.preflight(layout)

    def start(self) -> None:
        """Open an update."""
        if self._active:
            raise EngineError("start_weight_update called while a weight update is already active.")
        for session in self._sessions:
            session.start()
        self._active = True

    def update(self, info: dict[str, Any]) -> None:
        """Name the image."""
        if not self._active:
            raise EngineError("start_weight_update must be called before update_weights.")
        try:
            image = image_of(info)
        except ValueError as error:
            self._active = False
            raise EngineError(str(error)) from error
        for session in self._sessions:
            session.receive(image)

    def finish(self) -> None:
        """Apply it on all ranks, or on none."""
        if not self._active:
            raise EngineError("finish_weight_update called without a matching start_weight_update.")
        begun = [session.begin() for session in self._sessions]
        for session in self._sessions:
            session.complete(all(begun))
        self._active = False
