"""An operator as a process of its own, as it runs in a pod."""

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

START_SECONDS = 30.0
STOP_SECONDS = 15.0


class OperatorProcess:
    """``arguments`` go after the fixed ones. It listens on loopback, on free ports.

    ``program``: what python runs, for one with other limits than a pod's has.
    """

    def __init__(
        self,
        directory: Path,
        kubeconfig: Path,
        name: str,
        *arguments: str,
        program: tuple[str, ...] = ("-m", "weightsync_operator"),
    ) -> None:
        self.name = name
        self.log = directory / f"{name}.log"
        self._ports_file = directory / f"{name}.ports"
        self._command = [
            *(sys.executable, *program, "--kubeconfig", str(kubeconfig)),
            *("--session-port", "0", "--health-port", "0", "--metrics-port", "0"),
            *("--ports-file", str(self._ports_file)),
            *("--identity", name, *arguments),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self.ports: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['session']}"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, ready_seconds: float = START_SECONDS) -> None:
        """Start it and wait until it is ready. Raises AssertionError, with its log, if it is not in time."""
        self._ports_file.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        self._wait(self._ports_file.exists)
        self.ports = json.loads(self._ports_file.read_text())
        self._wait(lambda: self.get("/readyz")[0] == 200, ready_seconds)

    def kill(self) -> None:
        """End it as a crash would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(STOP_SECONDS)

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> int:
        """End it in an orderly way; answers its exit code."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(STOP_SECONDS)

    def wait(self, seconds: float) -> int:
        """Its exit code, once it has ended by itself."""
        assert self._process is not None
        return self._process.wait(seconds)

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of a health route; status 0 when nobody answers."""
        url = f"http://127.0.0.1:{self.ports['health']}{path}"
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def rss_mib(self) -> float:
        """Resident memory."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
        raise AssertionError("no VmRSS")

    def _wait(self, condition: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        assert self._process is not None
        deadline = time.monotonic() + seconds
        while not condition():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"{self.name} did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.05)
