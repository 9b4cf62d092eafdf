"""The trainer process as the demo drives it: commands in, events out."""

import json
import queue
import threading
import time
from typing import Any

from weightsync_demo.processes import Process


class Trainer:
    """Speaks with a running ``weightsync_demo.trainer``."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, name="trainer-events", daemon=True).start()

    def train(self, version: int) -> None:
        """Ask for the next version; it comes back as events."""
        stdin = self._process.popen.stdin
        assert stdin is not None, "the trainer was started with pipes"
        stdin.write(json.dumps({"train": version}) + "\n")
        stdin.flush()

    def wait(self, kind: str, seconds: float) -> dict[str, Any]:
        """The next event of that kind. Raises RuntimeError when the trainer ended or refused, or was slow."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise RuntimeError(f"the trainer did not say {kind!r} within {seconds:.0f} s") from None
            if event is None:
                raise RuntimeError(f"the trainer ended; its log says:\n{self._process.tail()}")
            if event["event"] == "refused":
                raise RuntimeError(f"version {event['version']} was refused: {event['message']}")
            if event["event"] == kind:
                return event

    def _read(self) -> None:
        stdout = self._process.popen.stdout
        assert stdout is not None, "the trainer was started with pipes"
        for line in stdout:
            self._events.put(json.loads(line))
        self._events.put(None)
