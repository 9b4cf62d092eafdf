"""The demo as a user runs it, with a second terminal beside it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from weightsync_demo.waiting import wait_for

NAMES = {"vllm-0", "vllm-1", "vllm-2"}


class Demo:
    """A demo that runs, and what it said so far."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "weightsync_demo", "--json", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    @property
    def told(self) -> str:
        return "\n".join(self.lines)

    def said(self, pattern: str, seconds: float) -> re.Match[str]:
        """Wait until it says so. Raises TimeoutError or RuntimeError with what it did say."""

        def found() -> re.Match[str] | None:
            match = re.search(pattern, self.told)
            if match is None and self.process.poll() is not None:
                raise RuntimeError(f"the demo ended without saying {pattern!r}:\n{self.told}")
            return match

        return wait_for(found, seconds, f"the demo to say {pattern!r}")

    def result(self, seconds: float) -> dict[str, Any]:
        """Its result, once it has ended by itself."""
        assert self.process.stdout is not None
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        with self.process.stdout:
            output = self.process.stdout.read()
        timer.cancel()
        self.process.wait(30)
        self._reader.join(5)
        assert output, f"the demo said nothing on its output within {seconds} s:\n{self.told}"
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
        return result


@contextmanager
def demo(*arguments: str) -> Iterator[Demo]:
    running = Demo(*arguments)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.send_signal(signal.SIGTERM)
            try:
                running.process.wait(30)
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
        for stream in (running.process.stdout, running.process.stderr):
            if stream is not None:
                stream.close()


def judge(result: dict[str, Any], told: str) -> None:
    assert result["ok"], f"{json.dumps(result, indent=1)}\n{told}"
    assert result["versions"] == [1, 2, 3]
    assert {member["name"] for member in result["members"]} == NAMES
    assert all(member["version"] == 3 and member["tokens_equal"] for member in result["members"])
    assert result["traffic"]["wrong"] == []
    assert result["traffic"]["right"] > 0
    expected = [row["expected"] for row in result["completions"]]
    assert len(set(expected)) == 3, f"versions that answer alike would prove nothing: {expected}"
    assert "in mid-transfer" in told


@pytest.mark.usefixtures("binaries")
@pytest.mark.timeout(900)
def test_the_demo_with_the_reference_engine_and_kubectl_beside_it(tmp_path: Path) -> None:
    with demo("--engine", "reference", "--dir", str(tmp_path)) as running:
        kubeconfig = running.said(r"KUBECONFIG=(\S+)", 120)[1]
        kubectl = running.said(r"(\S+/kubectl) get weightsync -w", 10)[1]
        env = {**os.environ, "KUBECONFIG": kubeconfig}

        def run(*arguments: str) -> str:
            done = subprocess.run(
                [kubectl, *arguments], env=env, capture_output=True, text=True, timeout=60, check=False
            )
            assert done.returncode == 0, f"kubectl {arguments}: {done.stderr}\n{running.told}"
            return done.stdout

        running.said("serve version 1", 600)
        wait_for(lambda: "Synced" in run("get", "weightsync", "policy", "-o", "yaml"), 30, "reason Synced")
        row = run("get", "weightsync", "policy").splitlines()
        assert row[0].split() == ["NAME", "READY", "VERSION", "TARGET", "SYNCED", "REASON", "AGE"]
        described = run("describe", "weightsync", "policy")
        assert "Conditions" in described
        assert "Events" in described
        judge(running.result(700), running.told)
    assert running.process.returncode == 0


@pytest.mark.vllm
@pytest.mark.usefixtures("binaries")
@pytest.mark.timeout(1200)
def test_the_demo_with_real_vllm() -> None:
    with demo() as running:
        result = running.result(1100)
        judge(result, running.told)
    assert result["engine"] == "vllm"
    assert running.process.returncode == 0


@pytest.mark.usefixtures("binaries")
def test_a_demo_that_is_told_to_end_leaves_no_process_behind(tmp_path: Path) -> None:
    with demo("--engine", "reference", "--dir", str(tmp_path)) as running:
        running.said("operator started", 180)
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(60)

    def left() -> list[str]:
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(tmp_path) in command:
                found.append(command)
        return found

    wait_for(lambda: not left(), 20, "every process of the demo to be gone")
