"""How an agent drives an inference engine: one protocol, and vLLM's routes behind it."""

from weightsync_engine.adapter.engine import (
    ApplyError,
    ArenaError,
    Engine,
    EngineInfo,
    EngineUnreachableError,
    ManifestRefusedError,
    Staged,
)
from weightsync_engine.adapter.http import HttpEngine

__all__ = [
    "ApplyError",
    "ArenaError",
    "Engine",
    "EngineInfo",
    "EngineUnreachableError",
    "HttpEngine",
    "ManifestRefusedError",
    "Staged",
]
