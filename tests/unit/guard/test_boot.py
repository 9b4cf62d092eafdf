"""The boot id and the end of an engine, with real processes in sessions and PID namespaces of their own."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from weightsync_engine import boot

SAY = "from weightsync_engine.boot import boot_id; print(boot_id(), flush=True)"


def say(code: str = SAY, **kwargs) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        **kwargs,
    )
    return done.stdout.split()


def test_all_processes_of_a_session_have_one_boot_and_another_session_another():
    twice = f"""
        import subprocess, sys
        for _ in range(2):
            subprocess.run([sys.executable, "-c", {SAY!r}], check=True)
        {SAY}
    """
    one, two, leader = say(twice, start_new_session=True)
    assert one == two == leader
    (other,) = say(start_new_session=True)
    assert other != leader


def test_the_same_process_id_started_again_is_another_boot(monkeypatch):
    before = boot.boot_id()
    real = boot._stat
    assert boot.boot_id() == before

    def started_later(pid):
        fields = real(pid)
        fields[19] = str(int(fields[19]) + 1)
        return fields

    monkeypatch.setattr(boot, "_stat", started_later)
    assert boot.boot_id() != before


def test_a_command_name_with_parentheses_and_blanks_is_read_past(tmp_path):
    program = tmp_path / "a) b (c 1 2 3"
    shutil.copy("/bin/sleep", program)
    process = subprocess.Popen([program, "30"], start_new_session=True)
    try:
        assert int(boot._stat(process.pid)[3]) == process.pid
    finally:
        process.kill()
        process.wait()


def test_without_a_leader_there_is_no_boot(monkeypatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setattr(boot, "session_leader", lambda: gone.pid)
    with pytest.raises(boot.BootError, match="first process"):
        boot.boot_id()


FAMILY = """
    import os, signal, subprocess, sys, time
    PIPE = subprocess.PIPE
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    children = [subprocess.Popen([sys.executable, "-c", deaf], stdout=PIPE) for _ in range(2)]
    for child in children:
        child.stdout.readline()
    ending = "from weightsync_engine.boot import end_engine; input(); end_engine()"
    ender = subprocess.Popen([sys.executable, "-c", ending], stdin=PIPE)
    print(os.getpid(), *[child.pid for child in children], ender.pid, flush=True)
    ender.stdin.write(b"now\\n"), ender.stdin.flush()
    time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def wait_gone(pids, seconds=10.0) -> None:
    until = time.monotonic() + seconds
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < until, f"still there: {left}"
        time.sleep(0.02)


def test_one_process_ends_all_of_the_session_leader_included_and_nobody_else():
    outsider = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
    )
    family = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(FAMILY)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert family.stdout is not None
        pids = [int(word) for word in family.stdout.readline().split()]
        assert len(pids) == 4
        wait_gone(pids)
        assert family.wait(10) == -signal.SIGKILL
        assert outsider.poll() is None
    finally:
        for process in (family, outsider):
            process.kill()
            process.communicate()


def unshared(code: str) -> subprocess.Popen:
    command = [
        "unshare",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        sys.executable,
        "-c",
        textwrap.dedent(code),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0
    or shutil.which("unshare") is None
    or subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, check=False
    ).returncode
    != 0,
    reason="PID namespaces need root and unshare",
)


@needs_namespaces
def test_the_first_process_of_a_container_ends_itself_and_so_all():
    process = unshared(
        """
        import os, subprocess, sys
        from weightsync_engine.boot import end_engine
        assert os.getpid() == 1
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
        end_engine()
        """
    )
    process.communicate(timeout=20)
    assert process.returncode == boot.EXIT_CODE


@needs_namespaces
def test_a_worker_ends_a_container_whose_first_process_takes_sigterm():
    process = unshared(
        """
        import os, signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, lambda *_: os._exit(3))
        ending = "from weightsync_engine.boot import end_engine; end_engine()"
        subprocess.Popen([sys.executable, "-c", ending])
        time.sleep(60)
        """
    )
    process.communicate(timeout=20)
    assert process.returncode == 3


@needs_namespaces
def test_processes_of_one_container_have_one_boot_and_two_containers_two():
    code = f"""
        import os, subprocess, sys
        os.setsid() if os.getsid(0) != 1 and os.getpgid(0) != os.getpid() else None
        {SAY}
        subprocess.run([sys.executable, "-c", {SAY!r}], check=True)
    """
    containers = [unshared(code) for _ in range(2)]
    said = [process.communicate(timeout=30)[0].split() for process in containers]
    assert all(len(words) == 2 and len(set(words)) == 1 for words in said)
    assert said[0][0] != said[1][0]


@needs_namespaces
def test_two_containers_that_were_started_in_the_same_moment_are_two():
    code = """
        from weightsync_engine import boot
        boot._stat = lambda pid: ["0"] * 40
        print(boot.boot_id(), flush=True)
    """
    one, two = (unshared(code) for _ in range(2))
    assert one.communicate(timeout=30)[0] != two.communicate(timeout=30)[0]
