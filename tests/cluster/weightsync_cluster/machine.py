"""A machine of the cluster: a process 1 with namespaces of its own (network, mounts, processes, host name).

Everything that it has hangs on that one process: when it is killed, the kernel takes the rest. Nothing in it
is seen outside but its processes, and no name of it is in the outer machine's network.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from weightsync_cluster.errors import ClusterError
from weightsync_demo.waiting import wait_for

HERE = Path(__file__).parent
NAMESPACES = ("--mount", "--net", "--pid", "--uts")
START_TIMEOUT_S = 10.0
KILL_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Unit:
    """A program that runs on a machine, started when all that it comes `after` answers (see init.answers)."""

    name: str
    command: Sequence[str]
    directory: str
    environment: dict[str, str]
    log: str
    after: Sequence[str] = ()
    descriptors: Sequence[int] = ()


@dataclass(frozen=True)
class Spec:
    """What process 1 does: run each command of `setup`, then keep the `units` running."""

    setup: Sequence[Sequence[str]]
    units: Sequence[Unit] = field(default_factory=tuple)


def _started(pid: int) -> str | None:
    """What tells a process from a later one of the same number; None where there is none that lives."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else f"{boot}/{fields[19]}"


class Machine:
    """The machine `name`, with what it writes below `directory`; it may run already, started by another."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.directory = directory
        self._launcher: subprocess.Popen[str] | None = None

    @property
    def log_directory(self) -> Path:
        return self.directory / "log"

    @property
    def pid(self) -> int | None:
        """Its process 1, as the outer machine numbers it; None where it doesn't run."""
        try:
            recorded = json.loads((self.directory / "process.json").read_text())
        except FileNotFoundError:
            return None
        pid: int = recorded["pid"]
        return pid if _started(pid) == recorded["started"] else None

    @property
    def running_pid(self) -> int:
        """Its process 1; ClusterError where it doesn't run."""
        pid = self.pid
        if pid is None:
            raise ClusterError(f"{self.name} doesn't run; its logs are in {self.log_directory}")
        return pid

    def start(self, spec: Spec, listener: socket.socket | None = None) -> None:
        """Start process 1, which then waits for `go`. `listener` is inherited under its own number."""
        self.log_directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / "spec.json"
        path.write_text(json.dumps(asdict(spec)))
        command = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "--propagation=private"]
        with (self.log_directory / "init.log").open("ab") as log:
            self._launcher = subprocess.Popen(
                [*command, sys.executable, "-IS", str(HERE / "init.py"), str(path)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
                pass_fds=[listener.fileno()] if listener else [],
            )
        launcher = self._launcher.pid
        children = Path(f"/proc/{launcher}/task/{launcher}/children")

        def first_child() -> int | None:
            if self._launcher is None or self._launcher.poll() is not None:
                log = (self.log_directory / "init.log").read_text()[-1000:]
                raise ClusterError(f"{self.name} can't have namespaces of its own here: {log}")
            return int(children.read_text().split()[0]) if children.read_text() else None

        init = wait_for(first_child, START_TIMEOUT_S, f"process 1 of {self.name}", interval=0.01)
        new = self.directory / "process.json.new"
        new.write_text(json.dumps({"pid": init, "started": _started(init)}))
        new.replace(self.directory / "process.json")

    def release(self) -> None:
        """Let process 1 begin: the network is there."""
        assert self._launcher is not None
        assert self._launcher.stdin is not None
        try:
            with self._launcher.stdin as stdin:
                stdin.write("go\n")
        except BrokenPipeError as error:
            raise ClusterError(f"{self.name} ended at once; see {self.log_directory}/init.log") from error

    def entering(self, *namespaces: str) -> list[str]:
        """What to put before a command so that it runs in the machine (all of its namespaces by default)."""
        return ["nsenter", f"--target={self.running_pid}", *(namespaces or NAMESPACES)]

    def kill(self) -> None:
        """End it as a power cut would; its disk stays. Does nothing where it doesn't run."""
        pid = self.pid
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            # Process 1 is there until each process of its namespace has ended.
            wait_for(lambda: self.pid is None, KILL_TIMEOUT_S, f"the end of {self.name}")
        if self._launcher is not None:
            if self._launcher.stdin and not self._launcher.stdin.closed:
                self._launcher.stdin.close()
            # It ends with its child: that was killed, or reads that nobody will say `go`.
            self._launcher.wait(KILL_TIMEOUT_S)
            self._launcher = None
