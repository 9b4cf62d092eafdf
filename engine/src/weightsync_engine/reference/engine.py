"""Generates tokens, one step at a time for all requests in turn, and can be paused between two steps.

The pause modes are vLLM's: keep lets running requests stand still and then go on (their caches are computed
anew, so that no key or value of other weights is left), wait lets them finish first, abort ends them.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

import torch

from weightsync_engine.reference.model import Cache, Llama

T = TypeVar("T")

MODES: Final = ("keep", "wait", "abort")


@dataclass(frozen=True)
class Token:
    """One generated token, with its log probability and the most probable others at its place."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class _Request:
    ids: list[int]
    cache: Cache = field(default_factory=list)
    aborted: bool = False


class AbortedError(Exception):
    """The request was ended by a pause in mode abort."""


class Engine:
    """Belongs to one event loop; the arithmetic runs in a thread, one step at a time."""

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.paused = False
        self._draining = False
        self._step = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._running: set[_Request] = set()

    @property
    def running(self) -> int:
        """Requests that have begun and not ended."""
        return len(self._running)

    async def generate(
        self, prompt: list[int], tokens: int, top: int, stop: frozenset[int]
    ) -> AsyncIterator[Token]:
        """Greedy tokens. Raises AbortedError when a pause ended it."""
        await self._until(lambda: not self.paused)
        request = _Request(list(prompt))
        self._running.add(request)
        try:
            for _ in range(tokens):
                token = await self._next(request, top)
                request.ids.append(token.id)
                yield token
                if token.id in stop:
                    return
        finally:
            self._running.discard(request)
            await self._notify()

    async def pause(self, mode: str) -> None:
        """Return once nothing runs and nothing will."""
        # In mode wait the running ones must still get their steps, and the new ones none.
        self.paused = True
        self._draining = mode == "wait"
        if mode == "abort":
            for request in self._running:
                request.aborted = True
        await self._notify()
        if mode in ("wait", "abort"):
            await self._until(lambda: not self._running)
        self._draining = False
        async with self._step:
            for request in self._running:
                request.cache.clear()

    async def resume(self) -> None:
        """Go on."""
        self.paused = False
        await self._notify()

    async def between_steps(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the thread while no step runs, as vLLM runs a worker's calls."""
        async with self._step:
            return await asyncio.to_thread(work)

    async def _next(self, request: _Request, top: int) -> Token:
        while True:
            await self._until(lambda: not self.paused or self._draining or request.aborted)
            if request.aborted:
                raise AbortedError("aborted by a pause")
            async with self._step:
                if not self.paused or self._draining:
                    return await asyncio.to_thread(self._compute, request, top)

    def _compute(self, request: _Request, top: int) -> Token:
        known = request.cache[0][0].shape[1] if request.cache else 0
        logits = self.model.logits(request.ids[known:], request.cache)
        logprobs = torch.log_softmax(logits, dim=-1)
        best = int(logits.argmax())
        rest = torch.topk(logprobs, top) if top else None
        others = tuple(zip(rest.indices.tolist(), rest.values.tolist(), strict=True)) if rest else ()
        return Token(best, float(logprobs[best]), others)

    async def _until(self, predicate: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(predicate)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
