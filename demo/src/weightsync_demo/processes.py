"""Processes that the demo starts: own session, own log file, dead when the demo is dead."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    # A demo killed with SIGKILL must leave no server behind; nothing else would end the orphan.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The demo's environment for its children.

    PYTHONDONTWRITEBYTECODE is left out: with it vLLM compiles itself anew at each start, in two minutes
    instead of half of one. KUBECONFIG is left out, so that no child finds a cluster that it was not told of.
    """
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "KUBECONFIG")}
    return {**kept, "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1", **extra}


class Process:
    """One supervised process and all that it starts (its session)."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        env: Mapping[str, str],
        *,
        pipes: bool = False,
    ) -> None:
        self.name = name
        self.log = log
        self.starts = 0
        self._command = list(command)
        self._env = environment(env)
        self._pipes = pipes
        self._popen: subprocess.Popen[str] | None = None
        self._ended_at = 0.0

    @property
    def popen(self) -> "subprocess.Popen[str]":
        """The running process. Raises RuntimeError before the first start."""
        if self._popen is None:
            raise RuntimeError(f"{self.name} was never started")
        return self._popen

    @property
    def alive(self) -> bool:
        """Is it running? Reaps it when it has ended."""
        return self._popen is not None and self._popen.poll() is None

    def start(self) -> None:
        """Start it; its output is appended to the log."""
        pipe = subprocess.PIPE if self._pipes else None
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(
                self._command,
                stdin=pipe or subprocess.DEVNULL,
                stdout=pipe or log,
                stderr=log,
                env=self._env,
                text=True,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 (one call of prctl, nothing that takes a lock)
            )
        self.starts += 1

    def restart_if_ended(self, backoff: float) -> bool:
        """Start it again when it has ended ``backoff`` seconds ago or earlier, as a kubelet would."""
        if self.alive or self._popen is None:
            return False
        if not self._ended_at:
            self._ended_at = time.monotonic()
            self._kill_session()
        if time.monotonic() - self._ended_at < backoff:
            return False
        self._ended_at = 0.0
        self.start()
        return True

    def kill(self) -> None:
        """SIGKILL to the whole session, as the kernel does when a container's memory is out."""
        self._kill_session()
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(5)

    def stop(self, seconds: float) -> None:
        """SIGTERM, and SIGKILL to what is left after ``seconds``."""
        if self._popen is None:
            return
        if self.alive:
            with suppress(ProcessLookupError):
                self._popen.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(seconds)
        self._kill_session()
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(5)

    def tail(self, lines: int = 15) -> str:
        """The end of its log, for error messages."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return "(no log)"

    def _kill_session(self) -> None:
        # start_new_session made its pid the process group, too; engine workers stay in that group.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, signal.SIGKILL)
