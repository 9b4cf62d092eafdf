"""kopf as the watch layer and nothing else: it hands on events, it decides nothing and writes nothing.

It runs in a thread with an event loop, a registry and settings of its own: at its end kopf cancels whatever
tasks its loop has, and the default registry is shared by everybody in a process. Its handlers only hand
over, since an exception in one is dropped, never tried again.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import kopf

from weightsync_contract import logs
from weightsync_contract.names import API_VERSION, GROUP, LABEL_ROLE, PLURAL
from weightsync_operator.kube.connection import Connection

log = logs.get(__name__)

_JOIN_SECONDS: Final = 5.0
_AGAIN_SECONDS: Final = 1.0
_GOODBYE_SECONDS: Final = 0.25

Handler = Callable[[bool, dict[str, Any]], None]
"""Called on the owner's loop with: is the object gone, the object."""


class _Backoffs:
    """Seconds between tries, for ever: kopf gives up at the end of a finite row, and ends."""

    def __iter__(self) -> Iterator[float]:
        yield from (0.2, 0.5, 1.0, 2.0)
        while True:
            yield 5.0


class Watch:
    """Watches WeightSyncs and pods with a role, in all namespaces or in one."""

    def __init__(
        self, connection: Connection, namespace: str, on_weightsync: Handler, on_pod: Handler
    ) -> None:
        self._connection = connection
        self._namespace = namespace
        self._on_weightsync = on_weightsync
        self._on_pod = on_pod
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.failures = 0
        """Watches that ended without being told to."""

    def start(self) -> None:
        """Start watching; call it on the loop that the handlers are to be called on."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """End watching; waits for it a few seconds."""
        self._stop.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, _JOIN_SECONDS)

    def _run(self) -> None:
        # kopf ends by itself when the API server sends an error within a stream. The sessions need not end
        # for that, and what is missed meanwhile the next LIST shows.
        while not self._stop.is_set():
            try:
                asyncio.run(self._watch())
            except Exception:
                log.exception("watching failed")
            if not self._stop.is_set():
                self.failures += 1
                log.warning("watching ended, beginning again", seconds=_AGAIN_SECONDS)
                self._stop.wait(_AGAIN_SECONDS)

    async def _watch(self) -> None:
        await kopf.operator(
            registry=self._registry(),
            settings=self._settings(),
            standalone=True,
            clusterwide=not self._namespace,
            namespaces=[self._namespace] if self._namespace else [],
            stop_flag=self._stop,
        )
        # kopf's TLS connections say goodbye in the background, and nothing tells when they have.
        await asyncio.sleep(_GOODBYE_SECONDS)

    def _registry(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()

        async def login(**_: Any) -> kopf.ConnectionInfo:
            return await asyncio.to_thread(self._connection.for_kopf)

        async def weightsync_event(event: Any, **_: Any) -> None:
            self._hand_over(self._on_weightsync, event["type"] == "DELETED", dict(event["object"]))

        async def pod_event(event: Any, **_: Any) -> None:
            self._hand_over(self._on_pod, event["type"] == "DELETED", dict(event["object"]))

        kopf.on.login(registry=registry)(login)
        kopf.on.event(GROUP, API_VERSION, PLURAL, registry=registry)(weightsync_event)
        kopf.on.event("", "v1", "pods", registry=registry)(pod_event)
        return registry

    def _settings(self) -> kopf.OperatorSettings:
        settings = kopf.OperatorSettings()
        # The key is a tuple: "v1/pods" is documented and matches nothing.
        settings.watching.label_selectors["v1", "pods"] = LABEL_ROLE
        settings.networking.error_backoffs = _Backoffs()
        settings.posting.enabled = False
        settings.scanning.disabled = True
        # Otherwise ending this thread arms a SIGKILL of the whole process.
        settings.process.ultimate_exiting_timeout = None
        return settings

    def _hand_over(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            log.debug("event after the end")
