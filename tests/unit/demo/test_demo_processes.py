"""What the demo starts, it also ends: whole sessions, also when it is itself killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from weightsync_demo.processes import Process, environment
from weightsync_demo.waiting import wait_for

SLEEPER = """
import subprocess, time
print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
time.sleep(600)
"""
DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(600)
"""


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return True
    return state == "Z"


def started(tmp_path: Path) -> tuple[Process, int]:
    process = Process("sleeper", [sys.executable, "-c", SLEEPER], tmp_path / "log", {})
    process.start()
    child = wait_for(lambda: process.log.read_text().split(), 10, "the grandchild's pid")
    return process, int(child[0])


def test_kill_ends_what_the_process_started_too(tmp_path: Path) -> None:
    process, grandchild = started(tmp_path)
    process.kill()
    assert not process.alive
    wait_for(lambda: gone(grandchild), 5, "the grandchild to end")


def test_stop_ends_one_that_ignores_sigterm(tmp_path: Path) -> None:
    process = Process("deaf", [sys.executable, "-c", DEAF], tmp_path / "log", {})
    process.start()
    wait_for(lambda: "up" in process.log.read_text(), 10, "the process to be up")
    process.stop(0.2)
    assert not process.alive


def test_an_ended_process_is_started_again_after_the_backoff_and_not_before(tmp_path: Path) -> None:
    process = Process("short", [sys.executable, "-c", "pass"], tmp_path / "log", {})
    process.start()
    process.popen.wait(10)
    assert not process.restart_if_ended(backoff=60)
    assert process.restart_if_ended(backoff=0)
    assert process.starts == 2
    process.stop(5)


def test_one_that_was_never_started_is_not_started(tmp_path: Path) -> None:
    process = Process("none", [sys.executable, "-c", "pass"], tmp_path / "log", {})
    assert not process.restart_if_ended(backoff=0)
    assert process.starts == 0


def test_children_die_with_a_demo_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from weightsync_demo.processes import Process\n"
        "p = Process('child', ['sleep', '600'], Path(sys.argv[1]), {}); p.start()\n"
        "print(p.popen.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent, parent.stdout:
        child = int(parent.stdout.readline())
        assert not gone(child)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait(5)
        wait_for(lambda: gone(child), 5, "the child to end with its parent")


def test_no_child_finds_a_cluster_that_it_was_not_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "/somebody/else")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    made = environment({"A": "b"})
    assert "KUBECONFIG" not in made
    assert "PYTHONDONTWRITEBYTECODE" not in made
    assert made["A"] == "b"
