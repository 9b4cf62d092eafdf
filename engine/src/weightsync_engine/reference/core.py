"""The engine's own thread: takes requests a token further in turn, and does between steps what must be."""

import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, TypeVar

import torch

from weightsync_contract import logs
from weightsync_engine.reference.llama import Cache, Llama

T = TypeVar("T")
log = logs.get(__name__)

_TOP: Final = 20


class Paused(Enum):
    """May requests go on?"""

    NO = "no"
    NEW = "new"
    """Those that run go on, none starts."""
    ALL = "all"


@dataclass(frozen=True)
class Step:
    """One token, or the end of a request without one; ``top`` holds the likeliest tokens and how likely."""

    token: int | None
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    finish: str | None = None


@dataclass
class Request:
    """A sequence under way. ``emit`` is called on the engine's thread."""

    prompt: tuple[int, ...]
    max_tokens: int
    ignore_eos: bool
    top: int
    emit: Callable[[Step], None]
    made: list[int] = field(default_factory=list)
    cache: Cache = field(default_factory=Cache)
    cancelled: bool = False


class Core(threading.Thread):
    """Start it, ``submit`` requests, ``call`` functions between two steps."""

    def __init__(self, model: Llama) -> None:
        super().__init__(name="engine-core", daemon=True)
        self.model = model
        self.paused = Paused.NO
        self.running: deque[Request] = deque()
        self.waiting: deque[Request] = deque()
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._drained: list[Future[None]] = []

    def submit(self, request: Request) -> None:
        """Queue a request."""
        self._calls.put(lambda: self.waiting.append(request))

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run ``function`` on this thread, between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(run)
        return future

    def pause(self, mode: str) -> "Future[None]":
        """Done once no request runs (wait), all were ended (abort), or all stand still (keep)."""
        done: Future[None] = Future()
        self._calls.put(lambda: self._pause(mode, done))
        return done

    def resume(self) -> "Future[None]":
        """Go on."""
        return self.call(self._resume)

    def run(self) -> None:
        """Until the process ends."""
        while True:
            idle = not (self.running and self.paused is not Paused.ALL)
            self._obey(wait=idle)
            if self.paused is Paused.NO:
                self.running.extend(self.waiting)
                self.waiting.clear()
            if self.running and self.paused is not Paused.ALL:
                self._step(self.running.popleft())
            if not self.running:
                self._tell_drained()

    def _obey(self, wait: bool) -> None:
        try:
            self._calls.get(block=wait)()
            while True:
                self._calls.get_nowait()()
        except queue.Empty:
            return

    def _pause(self, mode: str, done: "Future[None]") -> None:
        if mode == "keep":
            self.paused = Paused.ALL
        else:
            self.paused = Paused.NEW
        if mode == "abort":
            while self.running:
                self.running.popleft().emit(Step(None, finish="abort"))
        # What was computed from the old weights must not meet the new ones: it is computed again.
        for request in self.running:
            if mode == "keep":
                request.cache = Cache()
        if mode == "wait":
            self._drained.append(done)
        else:
            done.set_result(None)

    def _resume(self) -> None:
        self.paused = Paused.NO

    def _tell_drained(self) -> None:
        for future in self._drained:
            future.set_result(None)
        self._drained.clear()

    def _step(self, request: Request) -> None:
        if request.cancelled:
            return
        try:
            step = self._next(request)
        except Exception:
            log.exception("request failed")
            step = Step(None, finish="error")
        if step.finish is None:
            self.running.append(request)
        request.emit(step)

    def _next(self, request: Request) -> Step:
        known = (*request.prompt, *request.made)
        logprobs = self.model.forward(torch.tensor(known[request.cache.length :]), request.cache)
        best = torch.topk(logprobs, max(1, min(_TOP, request.top)))
        token = int(best.indices[0])
        request.made.append(token)
        finish = None
        if token == self.model.config.eos and not request.ignore_eos:
            finish = "stop"
        elif len(request.made) == request.max_tokens:
            finish = "length"
        pairs: Any = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return Step(token, float(best.values[0]), tuple(pairs) if request.top else (), finish)
