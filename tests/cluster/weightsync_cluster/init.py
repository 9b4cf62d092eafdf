"""Process 1 of a machine: `python -IS init.py SPEC`, in namespaces of its own.

It sets the machine up, starts its programs, starts again whatever ends, and reaps what is left behind. When it
ends, the kernel ends everything in the machine and takes its mounts and its network away. It waits for the
line `go` first: should whoever starts the machine end before the network is there, the machine ends too.

It runs before anything is set up, so it imports nothing but the standard library.
"""

import json
import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

POLL_S = 0.1
RESTART_AFTER_S = 1.0
PROBE_TIMEOUT_S = 1.0


def answers(place: str) -> bool:
    """Whether a Unix socket (`unix:/path`) takes connections, or `https://...` answers 200 to anybody."""
    try:
        if place.startswith("unix:"):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(PROBE_TIMEOUT_S)
                client.connect(place.removeprefix("unix:"))
            return True
        # Whether it is there is asked, not who it is.
        context = ssl._create_unverified_context()
        with urllib.request.urlopen(place, timeout=PROBE_TIMEOUT_S, context=context) as response:
            return bool(response.status == 200)
    except OSError:
        return False


class Unit:
    """A program that is to run, once all that it comes after answers."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.name: str = spec["name"]
        self._spec = spec
        self._after: list[str] = list(spec["after"])
        self._not_before = 0.0
        self.pid: int | None = None

    def start_if_due(self) -> None:
        if self.pid is not None or time.monotonic() < self._not_before:
            return
        while self._after:
            if not answers(self._after[0]):
                return
            self._after.pop(0)
        try:
            self.pid = self._start()
        except OSError as error:
            self.ended(str(error))

    def _start(self) -> int:
        with Path(self._spec["log"]).open("ab") as log:
            process = subprocess.Popen(
                self._spec["command"],
                cwd=self._spec["directory"],
                env=self._spec["environment"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=self._spec["descriptors"],
                start_new_session=True,
            )
        # Reaped by its pid with everybody else; Popen would only wait for it a second time.
        process.returncode = 0
        return process.pid

    def ended(self, how: str) -> None:
        print(f"{self.name} ended: {how}", flush=True)
        self.pid = None
        self._not_before = time.monotonic() + RESTART_AFTER_S


def reap(units: list[Unit]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        for unit in units:
            if unit.pid == pid:
                unit.ended(f"status {os.waitstatus_to_exitcode(status)}")


def main() -> int:
    spec = json.loads(Path(sys.argv[1]).read_text())
    if sys.stdin.readline() != "go\n":
        print("whoever started this machine ended before its network was there", flush=True)
        return 1
    for command in spec["setup"]:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    units = [Unit(unit) for unit in spec["units"]]
    while True:
        reap(units)
        for unit in units:
            unit.start_if_due()
        time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main())
