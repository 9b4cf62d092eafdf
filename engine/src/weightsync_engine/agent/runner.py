"""The one place where an agent's state lives: an event in, effects out in order, the next event."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable

from weightsync_contract import logs
from weightsync_engine.agent.core import State, step, wake_at
from weightsync_engine.agent.core.effects import REST_ON_PERMIT, Effect, Report, WriteJournal, WritePermit
from weightsync_engine.agent.core.events import (
    ChildProgress,
    Event,
    JournalFailed,
    JournalWritten,
    PermitFailed,
    Tick,
)

log = logs.get(__name__)


class Runner:
    """Runs ``step`` for ever. ``perform`` carries out an effect; only WriteJournal and WritePermit may raise.

    ``perform`` must come back soon: what takes time goes on by itself and posts its event when it is over.
    """

    def __init__(
        self,
        state: State,
        perform: Callable[[Effect], Awaitable[None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = state
        self._perform = perform
        self._clock = clock
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._changed = asyncio.Event()

    @property
    def state(self) -> State:
        """The present state."""
        return self._state

    def post(self, event: Event) -> None:
        """Let something have happened. Only from the event loop's thread."""
        self._events.append(event)
        self._arrived.set()

    async def until(self, condition: Callable[[State], bool], seconds: float) -> bool:
        """Wait until the state is so; False when it was not within ``seconds``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not condition(self._state):
                    self._changed.clear()
                    await self._changed.wait()
        return condition(self._state)

    async def run(self) -> None:
        """Go on until cancelled."""
        while True:
            event = await self._next()
            self._state, effects = step(self._state, event, self._clock())
            self._changed.set()
            if not isinstance(event, (Tick, ChildProgress)):
                log.debug("event", what=event)
            await self._carry_out(effects)

    async def _next(self) -> Event:
        if not self._events:
            self._arrived.clear()
            now = self._clock()
            at = wake_at(self._state, now)
            with contextlib.suppress(TimeoutError):
                # A moment that has come without a rule acting on it must not become a busy loop.
                async with asyncio.timeout(None if at is None else max(at - now, 0.01)):
                    await self._arrived.wait()
        return self._events.popleft() if self._events else Tick()

    async def _carry_out(self, effects: tuple[Effect, ...]) -> None:
        answers: list[Event] = []
        permitted = True
        for effect in effects:
            if isinstance(effect, REST_ON_PERMIT) and not permitted:
                continue
            if not isinstance(effect, Report):
                log.debug("effect", what=effect)
            try:
                await self._perform(effect)
            except OSError as error:
                log.error("effect failed", what=effect, error=error)
                if isinstance(effect, WriteJournal):
                    answers.append(JournalFailed(effect.entry, str(error)))
                elif isinstance(effect, WritePermit):
                    answers.append(PermitFailed(effect.permit, str(error)))
                    permitted = False
                else:
                    raise
            else:
                if isinstance(effect, WriteJournal):
                    answers.append(JournalWritten(effect.entry))
        self._events.extend(answers)
