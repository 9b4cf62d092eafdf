"""Manifests by layout id: what came over a group once is known until it is pushed out by others."""

from weightsync_contract.manifest import Manifest
from weightsync_engine.agent.core.check import KEPT_LAYOUTS


class Manifests:
    """Keeps as many as the core believes to be known; the core names only these."""

    def __init__(self) -> None:
        self._kept: dict[str, Manifest] = {}

    def keep(self, manifest: Manifest) -> None:
        """Keep it as the newest."""
        self._kept.pop(manifest.layout, None)
        self._kept[manifest.layout] = manifest
        while len(self._kept) > KEPT_LAYOUTS:
            del self._kept[next(iter(self._kept))]

    def get(self, layout: str) -> Manifest:
        """The manifest of a layout. Raises KeyError."""
        return self._kept[layout]
