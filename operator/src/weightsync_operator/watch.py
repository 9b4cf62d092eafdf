"""kopf as the watch layer and nothing else: it hands on events, it decides nothing and writes nothing.

It runs in a thread with an event loop, a registry and settings of its own: at its end kopf cancels whatever
tasks its loop has, and the default registry is shared by everybody in a process. Its handlers only hand
over, since an exception in one is dropped, never tried again.
"""

import asyncio
import threading
from collections.abc import Callable
from typing import Any, Final

import kopf

from weightsync_contract import logs
from weightsync_contract.names import API_VERSION, GROUP, LABEL_ROLE, PLURAL
from weightsync_operator.kube.connection import Connection

log = logs.get(__name__)

_JOIN_SECONDS: Final = 5.0

Handler = Callable[[bool, dict[str, Any]], None]
"""Called on the owner's loop with: is the object gone, the object."""


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
        self._ended: asyncio.Future[None] | None = None

    def start(self) -> None:
        """Start watching; call it on the loop that the handlers are to be called on."""
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    async def ended(self) -> None:
        """Returns when watching has ended, which nobody but ``stop`` should cause."""
        assert self._ended is not None, "start() comes first"
        await asyncio.shield(self._ended)

    async def stop(self) -> None:
        """End watching; waits for it a few seconds."""
        self._stop.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, _JOIN_SECONDS)

    def _run(self) -> None:
        try:
            asyncio.run(
                kopf.operator(
                    registry=self._registry(),
                    settings=self._settings(),
                    standalone=True,
                    clusterwide=not self._namespace,
                    namespaces=[self._namespace] if self._namespace else [],
                    stop_flag=self._stop,
                )
            )
        except BaseException:
            log.exception("watching failed")
        finally:
            self._hand_over(self._end)

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

    def _end(self) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)
