"""Stands in front of every request to an engine: ``--middleware weightsync_engine.guard.Guard``.

Standard library and contract only: it runs in the engine's process, beside whatever that pins.
"""

from weightsync_engine.guard.middleware import Guard

__all__ = ["Guard"]
