"""Kubernetes Events, recorded beside the work: a slow API server delays or loses them, nothing else."""

import asyncio
import secrets
from typing import Final

from weightsync_contract import logs
from weightsync_operator.core.model import Note
from weightsync_operator.documents import Stored
from weightsync_operator.kube.api import Api
from weightsync_operator.kube.errors import KubeError
from weightsync_operator.kube.resources import create_event

log = logs.get(__name__)

_WAITING: Final = 256


class Recorder:
    """Takes notes at once and writes them one after the other."""

    def __init__(self, api: Api, identity: str) -> None:
        self._api = api
        self._identity = identity
        self._notes: asyncio.Queue[tuple[Stored, Note]] = asyncio.Queue(_WAITING)

    def record(self, about: Stored, note: Note) -> None:
        """Write ``note`` soon; it is dropped, and logged, if too many wait."""
        level = log.warning if note.warning else log.info
        name = f"{about.ref.namespace}/{about.ref.name}"
        level("event", weightsync=name, reason=note.reason, message=note.message)
        try:
            self._notes.put_nowait((about, note))
        except asyncio.QueueFull:
            log.warning("event dropped", weightsync=name, reason=note.reason)

    async def run(self) -> None:
        """Write notes for ever."""
        while True:
            about, note = await self._notes.get()
            try:
                await create_event(self._api, about.ref, note, self._identity, secrets.token_hex(8))
            except KubeError as error:
                log.warning("event not written", reason=note.reason, error=error)
