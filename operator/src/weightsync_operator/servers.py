"""Ports, taken before anything else starts so that everybody can be told where they are."""

import json
import socket
import ssl
from pathlib import Path

from aiohttp import web

from weightsync_operator.settings import Settings


class Ports:
    """The listening sockets of a replica. Raises OSError naming the port that can't be had."""

    def __init__(self, settings: Settings, tls: ssl.SSLContext | None = None) -> None:
        self._session = _listen(settings.session_host, settings.session_port)
        self._health = _listen(settings.session_host, settings.health_port)
        self._metrics = _listen(settings.session_host, settings.metrics_port)
        self._tls = tls
        self._runners: list[web.AppRunner] = []

    @property
    def session(self) -> int:
        port: int = self._session.getsockname()[1]
        return port

    @property
    def health(self) -> int:
        port: int = self._health.getsockname()[1]
        return port

    @property
    def metrics(self) -> int:
        port: int = self._metrics.getsockname()[1]
        return port

    def write(self, path: Path) -> None:
        """Tell the ports in a file, whole or not at all."""
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(
            json.dumps({"session": self.session, "health": self.health, "metrics": self.metrics})
        )
        temporary.replace(path)

    async def serve(
        self, session: web.Application, health: web.Application, metrics: web.Application
    ) -> None:
        """Answer on all."""
        await self._serve(session, self._session, self._tls)
        await self._serve(health, self._health, None)
        await self._serve(metrics, self._metrics, None)

    async def close(self) -> None:
        """Answer no more."""
        for runner in self._runners:
            await runner.cleanup()
        self._session.close()
        self._health.close()
        self._metrics.close()

    async def _serve(
        self, app: web.Application, listening: socket.socket, tls: ssl.SSLContext | None
    ) -> None:
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        self._runners.append(runner)
        await web.SockSite(runner, listening, ssl_context=tls).start()


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OSError(error.errno, f"can't listen on {host} port {port}: {error.strerror}") from error
