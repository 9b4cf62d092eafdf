"""Reads the live fleet from the operator, as any command line or page would."""

import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Final

from weightsync_contract.codec import MalformedError, loads
from weightsync_contract.fleetview import FleetView, MemberView
from weightsync_contract.messages import ServingState, VersionId
from weightsync_contract.names import FLEET_PATH
from weightsync_contract.reasons import Role

_PERIOD: Final = 0.2
_SECONDS: Final = 5.0


class FleetReader:
    """Polls the operator, whose certificate ``bundle`` (PEM) signs, and keeps the newest answer."""

    def __init__(self, url: str, token: str, bundle: str, on_change: Callable[[FleetView], None]) -> None:
        headers = {"Authorization": f"Bearer {token}"}
        self._request = urllib.request.Request(url, headers=headers)  # noqa: S310 (our own operator)
        self._tls = ssl.create_default_context(cadata=bundle)
        self._on_change = on_change
        self._latest: FleetView | None = None
        self.trouble = "it was not asked yet"
        """Why the last question had no answer."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="fleet", daemon=True)

    @property
    def latest(self) -> FleetView | None:
        """What the operator answered last; None before the first answer."""
        return self._latest

    def start(self) -> None:
        """Begin to poll."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._ended.set()
        self._thread.join(_SECONDS)

    def member(self, name: str) -> MemberView | None:
        """A pod of the fleet by name."""
        view = self._latest
        return next((m for m in view.members if m.name == name), None) if view else None

    def serving(self, names: list[str], version: VersionId) -> bool:
        """Do all of these serve that version?"""
        found = [self.member(name) for name in names]
        return all(
            m is not None
            and m.serving is not None
            and m.serving.state is ServingState.SERVING
            and m.serving.version == version
            for m in found
        )

    def _loop(self) -> None:
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self._tls)
        )
        while not self._ended.wait(_PERIOD):
            try:
                with opener.open(self._request, timeout=_SECONDS) as response:
                    view = loads(FleetView, response.read())
            except (OSError, MalformedError) as error:
                # An operator that restarts is part of life; the next poll tells.
                self.trouble = _reason(error)
                continue
            if view != self._latest:
                self._latest = view
                self._on_change(view)


def _reason(error: Exception) -> str:
    said = error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else ""
    return f"{error} {said}".strip()


def fleet_url(session_port: int, namespace: str, name: str) -> str:
    """Where the operator answers for one WeightSync."""
    return f"https://127.0.0.1:{session_port}{FLEET_PATH}/{namespace}/{name}"


def inference_members(view: FleetView) -> list[MemberView]:
    """Those that serve, by name."""
    return sorted((m for m in view.members if m.role == Role.INFERENCE), key=lambda m: m.name)
