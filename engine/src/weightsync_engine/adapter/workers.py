"""All ranks of an engine, asked at once over their sockets."""

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from weightsync_engine.adapter.engine import EngineUnreachableError
from weightsync_engine.worker.client import UnreachableError, WorkerClient, WorkerRefusedError
from weightsync_engine.worker.sockets import all_sockets, rank_sockets

T = TypeVar("T")

SECONDS: Final = 5.0
_GRACE: Final = 1.0


class RankRefusedError(Exception):
    """At least one rank said no; the message names the ranks and their words."""


class Workers:
    """The processes that have a socket in ``directory``. Everything raises EngineUnreachableError."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # Of its own: calls that hang must not take the threads that the agent needs for its journal.
        self._threads = ThreadPoolExecutor(32, thread_name_prefix="engine-socket")

    def close(self) -> None:
        """Wait for nobody."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def ranks(
        self, ask: Callable[[WorkerClient], T], world_size: int, seconds: float = SECONDS
    ) -> list[T]:
        """Ask the first ``world_size`` ranks. Raises RankRefusedError, once all have answered."""
        paths = rank_sockets(self._directory)
        missing = [rank for rank in range(world_size) if rank not in paths]
        if missing:
            raise EngineUnreachableError(
                f"no socket of rank {missing[0]} in {self._directory}: is the engine started with"
                ' --weight-transfer-config \'{"backend":"weightsync"}\' and WEIGHTSYNC_DIR?'
            )
        answers = await asyncio.gather(
            *(self._ask(ask, paths[rank], seconds) for rank in range(world_size)), return_exceptions=True
        )
        refused, found = [], []
        for rank, answer in enumerate(answers):
            if isinstance(answer, WorkerRefusedError):
                refused.append(f"rank {rank}: {answer}")
            elif isinstance(answer, UnreachableError):
                raise EngineUnreachableError(f"rank {rank} does not answer: {answer}") from answer
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found.append(answer)
        if refused:
            raise RankRefusedError("; ".join(refused))
        return found

    async def everybody(self, ask: Callable[[WorkerClient], T], seconds: float = SECONDS) -> list[T]:
        """Ask every process, and get what those say that answer."""
        paths = all_sockets(self._directory)
        answers = await asyncio.gather(
            *(self._ask(ask, path, seconds) for path in paths), return_exceptions=True
        )
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def _ask(self, ask: Callable[[WorkerClient], T], path: Path, seconds: float) -> T:
        if seconds <= 0:
            raise UnreachableError("no time left")
        loop = asyncio.get_running_loop()
        call = functools.partial(ask, WorkerClient(path, seconds))
        try:
            async with asyncio.timeout(seconds + _GRACE):
                return await loop.run_in_executor(self._threads, call)
        except TimeoutError as error:
            raise UnreachableError(f"{path}: no answer in {seconds:.1f} s") from error
