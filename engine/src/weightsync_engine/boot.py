"""Which start of the engine a process belongs to, and how to end that start for certain.

An engine is all processes of one session (setsid): its API servers, its core, its workers. A container
runtime makes one for the container's first process; whoever starts engines elsewhere must do the same
(``start_new_session=True``), or a restart below the same shell would look like the boot before. The id is
made of what the kernel says about the session's leader, so that every process finds the same one without
being told: the machine's boot, the PID namespace, the leader's process id and when it was started (in clock
ticks, 10 ms). Nobody chooses it and it is no secret.
"""

import hashlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

EXIT_CODE: Final = 137
_PROC: Final = Path("/proc")


class BootError(RuntimeError):
    """There is no telling which start of the engine this process belongs to."""


def boot_id() -> str:
    """The boot of the engine that this process belongs to. Raises BootError."""
    leader = session_leader()
    try:
        started = _stat(leader)[19]
        machine = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        namespace = (_PROC / "self/ns/pid").readlink()
    except (OSError, IndexError) as error:
        raise BootError(
            f"the engine's first process {leader} can't be read in /proc ({error}): start the engine with the"
            " process that leads its session kept alive, as a container's command is"
        ) from error
    parts = f"{machine} {namespace} {leader} {started}"
    return hashlib.sha256(parts.encode()).hexdigest()[:24]


def session_leader() -> int:
    """Process id of the leader of this process's session; 1 when it lives outside of the PID namespace."""
    return os.getsid(0) or 1


def engine_processes() -> tuple[int, ...]:
    """Every process of the engine but this one, the leader last.

    Where the leader is the namespace's first process, it is a container's: then all that the container runs
    belongs to the engine, whatever session it made for itself.
    """
    leader, own = session_leader(), os.getpid()
    members = [pid for pid, session in _sessions() if pid != own and leader in (1, session)]
    return tuple(sorted(members, key=lambda pid: (pid == leader, pid)))


def end_engine(deadline: float = 5.0) -> NoReturn:
    """End every process of the engine, this one last, with exit code 137; never returns, never raises.

    SIGKILL can't be caught or blocked, with one exception: the first process of a PID namespace does not get
    it from inside. It ends when it calls this itself (the kernel then ends the rest), or by SIGTERM, which a
    handler may take as it likes; so the guard listens in every API process, and not the workers alone.
    """
    until = time.monotonic() + deadline
    with suppress(BaseException):
        # Until there is nobody left to kill: a process may start another one while it is being ended.
        while (others := engine_processes()) and time.monotonic() < until:
            for pid in others:
                _kill(pid, signal.SIGTERM if pid == 1 else signal.SIGKILL)
            if others == (1,):
                time.sleep(0.05)
    os._exit(EXIT_CODE)


def _kill(pid: int, number: signal.Signals) -> None:
    with suppress(OSError):
        os.kill(pid, number)


def _sessions() -> Iterator[tuple[int, int]]:
    """Process and session ids of all that runs in this PID namespace and is not dead already."""
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError, IndexError, ValueError):
            state = _stat(int(entry.name))
            if state[0] not in ("Z", "X"):
                yield int(entry.name), int(state[3])


def _stat(pid: int) -> list[str]:
    """Fields of /proc/<pid>/stat from the third, the state, on."""
    # The second is the command's name in parentheses, which may hold blanks and parentheses of its own.
    return (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
