"""An engine's control routes over HTTP, each call with a deadline."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import aiohttp

from weightsync_engine.adapter.engine import EngineUnreachableError

TOKEN_FILE: Final = "control-token"


class RouteError(EngineUnreachableError):
    """The engine answered with an error; the message holds its own words. ``status`` is HTTP's."""

    def __init__(self, route: str, status: int, message: str) -> None:
        super().__init__(f"{route} answered {status}: {message}")
        self.status = status


class SilentError(EngineUnreachableError):
    """Somebody took the call and did not answer in time."""


class Routes:
    """Calls with the agent's token. Raises EngineUnreachableError when there is no answer in time."""

    def __init__(self, url: str, directory: Path) -> None:
        self._url = url.rstrip("/")
        self._token = directory / TOKEN_FILE
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        # A connection kept from the boot before would fail the first call to the next one.
        connector = aiohttp.TCPConnector(force_close=True)
        self._session = aiohttp.ClientSession(connector=connector, trust_env=False)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session:
            await self._session.close()

    async def get(self, route: str, seconds: float) -> dict[str, Any]:
        """GET a JSON object, empty for an empty body."""
        return await self._call("GET", route, seconds, None)

    async def post(self, route: str, seconds: float, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """POST and get a JSON object."""
        return await self._call("POST", route, seconds, body)

    async def _call(
        self, method: str, route: str, seconds: float, body: dict[str, Any] | None
    ) -> dict[str, Any]:
        assert self._session is not None, "used outside of its context"
        if seconds <= 0:
            raise EngineUnreachableError(f"no time left for {method} {route}")
        try:
            async with self._session.request(
                method,
                self._url + route,
                json=body,
                headers={"authorization": f"Bearer {self._secret()}"},
                timeout=aiohttp.ClientTimeout(total=seconds),
                allow_redirects=False,
            ) as response:
                text = await response.text()
                status = response.status
        except TimeoutError as error:
            raise SilentError(f"{method} {route}: no answer in {seconds:.1f} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise EngineUnreachableError(f"{method} {route}: {str(error) or repr(error)}") from error
        if status != 200:
            raise RouteError(f"{method} {route}", status, _words(text))
        return _object(text)

    def _secret(self) -> str:
        try:
            return self._token.read_text().strip()
        except OSError:
            return ""


def _object(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text) if text else {}
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _words(text: str) -> str:
    """The cause that an error body names, in vLLM's form or ours."""
    error = _object(text).get("error", text)
    message = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(message).split())[:500]
