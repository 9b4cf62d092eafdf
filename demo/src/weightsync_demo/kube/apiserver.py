"""A kube-apiserver with its etcd in the same process, as a child of this one."""

import os
import secrets
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from weightsync_demo.kube import ports
from weightsync_demo.kube.build import Binaries
from weightsync_demo.kube.credentials import write_kubeconfig, write_private
from weightsync_demo.kube.errors import ApiServerError, KubectlError
from weightsync_demo.kube.flags import ETCD_DIRECTORY, ETCD_URL, apiserver_flags
from weightsync_demo.kube.https import get_status
from weightsync_demo.kube.locking import exclusive
from weightsync_demo.waiting import wait_for

HOST = "127.0.0.1"
# Tries to start on one port after another, when another process took a port between its choice and its use.
START_ATTEMPTS = 5
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
LOCK_TIMEOUT_S = 5.0
PORT_TAKEN = "address already in use"


class ApiServer:
    """One API server and its state below `directory`: objects, certificates, port and admin token.

    It authenticates by certificates, tokens and ServiceAccount tokens and authorizes by RBAC, as a cluster
    does. Started again in the same directory it has the same objects and the same kubeconfig, also after
    `kill`. It ends within a second of the process that started it, however that one ends. It is in a
    process group of its own: Ctrl-C in a terminal doesn't reach it.
    """

    def __init__(self, directory: Path, binaries: Binaries) -> None:
        self.directory = directory.resolve()
        self.binaries = binaries
        self._process: subprocess.Popen[bytes] | None = None
        # The admin's token and the keys are in here.
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def kubeconfig(self) -> Path:
        """A kubeconfig for the admin; there from the first start on."""
        return self.directory / "kubeconfig"

    @property
    def url(self) -> str:
        return f"https://{HOST}:{self.port}"

    @property
    def port(self) -> int:
        return int((self.directory / "port").read_text())

    @property
    def ca_file(self) -> Path:
        """What the server's certificate is verified with."""
        return self.directory / "certs" / "apiserver.crt"

    @property
    def log(self) -> Path:
        """What the server wrote, of all its starts."""
        return self.directory / "log"

    @property
    def token(self) -> str:
        """The admin's bearer token."""
        return (self.directory / "tokens.csv").read_text().split(",")[0]

    @property
    def pid(self) -> int:
        """The server's process id; ApiServerError if it was not started."""
        if self._process is None:
            raise ApiServerError("the API server was not started")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server and wait until it is ready, at most START_TIMEOUT_S.

        A directory's first start chooses a free port, any later one takes the same port again. Raises
        ApiServerError with the errors in the log.
        """
        if self.running:
            raise ApiServerError(f"the API server is running already, as process {self.pid}")
        tokens = self.directory / "tokens.csv"
        if not tokens.exists():
            write_private(tokens, f"{secrets.token_urlsafe(32)},admin,admin,system:masters\n")
        known = (self.directory / "port").exists()
        for attempt in range(1, START_ATTEMPTS + 1):
            if not known:
                (self.directory / "port").write_text(str(ports.choose(HOST)))
            written = self.log.stat().st_size if self.log.exists() else 0
            self._process = self._spawn_alone()
            try:
                nobody_answers = (OSError, HTTPException)
                wait_for(self._ready, START_TIMEOUT_S, "the API server's /readyz", ignoring=nobody_answers)
                break
            except (ApiServerError, TimeoutError) as error:
                self.kill()
                errors = self._errors_since(written)
                if PORT_TAKEN in errors and not known and attempt < START_ATTEMPTS:
                    continue
                raise ApiServerError(f"{error}; errors in {self.log}:\n{errors[-3000:]}") from error
        write_kubeconfig(self.kubeconfig, self.url, self.ca_file, self.token)

    def stop(self) -> None:
        """End the server in an orderly way; SIGKILL if that takes longer than STOP_TIMEOUT_S."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server as a crash would, by SIGKILL."""
        self._end(signal.SIGKILL)

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout: float = 60.0) -> str:
        """The output of kubectl, run as the admin; KubectlError if it fails or outlasts `timeout` s."""
        command = [str(self.binaries.kubectl), f"--kubeconfig={self.kubeconfig}", *arguments]
        try:
            done = subprocess.run(
                command, input=stdin, capture_output=True, text=True, check=False, timeout=timeout
            )
        except subprocess.TimeoutExpired as error:
            raise KubectlError(f"kubectl {' '.join(arguments)}: no end after {timeout:g} s") from error
        if done.returncode != 0:
            raise KubectlError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(how)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ready(self) -> bool:
        if not self.running:
            raise ApiServerError("the API server ended while it was starting")
        return get_status(self.url, "/readyz", self.ca_file, self.token) == 200

    def _errors_since(self, offset: int) -> str:
        """What the log says from `offset` on, less what only informs or warns: hundreds of lines a start."""
        with self.log.open("rb") as log:
            log.seek(offset)
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(line for line in lines if not line.startswith(("I", "W")))

    def _spawn_alone(self) -> subprocess.Popen[bytes]:
        # The server inherits the lock and holds it until its own end: two of them would take each other's
        # socket. One whose parent was killed is still there for a moment.
        try:
            with exclusive(self.directory / "lock", LOCK_TIMEOUT_S, lambda: None) as lock:
                return self._spawn(lock)
        except TimeoutError as error:
            raise ApiServerError(f"another API server runs in {self.directory}") from error

    def _spawn(self, lock: int) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [self.binaries.kube_apiserver, *apiserver_flags(HOST, self.port)],
                cwd=self.directory,
                env={
                    **os.environ,
                    "EMBED_ETCD_DIR": ETCD_DIRECTORY,
                    "EMBED_ETCD_URL": ETCD_URL,
                    "HYPER_PARENT_PID": str(os.getpid()),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock,),
            )


@contextmanager
def run_apiserver(directory: Path, binaries: Binaries) -> Iterator[ApiServer]:
    """A ready API server with its state below `directory`, stopped at the end of the block.

    Raises ApiServerError if it doesn't become ready.
    """
    server = ApiServer(directory, binaries)
    server.start()
    try:
        yield server
    finally:
        server.stop()
