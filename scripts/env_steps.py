"""Running the steps of a setup: one line a step with its seconds, and errors that say what to do."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

SIGN_OF_LIFE = 10.0
# What an outer virtual environment or a build leaves behind, and would steer ours.
FOREIGN = ("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT", "PYTHONDONTWRITEBYTECODE")
_INDEX = re.compile(r"\w+://[^\s)\"'`]+")


class SetupError(Exception):
    """The setup can't go on; the message says what the person at the keyboard can do."""


@contextmanager
def step(title: str) -> Iterator[None]:
    """A line with the title at once, completed by the seconds that the step took."""
    print(f"  {title} ", end="", flush=True)
    start = time.monotonic()
    try:
        yield
    except BaseException:
        print(f" failed after {time.monotonic() - start:.1f} s", flush=True)
        raise
    print(f" {time.monotonic() - start:.1f} s", flush=True)


def environment(base: Mapping[str, str]) -> dict[str, str]:
    """What the tools run with.

    Bytecode is written whatever the caller's environment says: vLLM starts five times slower without it.
    uv does not read pip's settings, so a machine that names its index or its certificates to pip alone
    passes them on here.
    """
    env = {name: value for name, value in base.items() if name not in FOREIGN}
    env["UV_PYTHON_DOWNLOADS"] = "never"
    for pip_name, uv_name in (("PIP_INDEX_URL", "UV_DEFAULT_INDEX"), ("PIP_CERT", "SSL_CERT_FILE")):
        if env.get(pip_name):
            env.setdefault(uv_name, env[pip_name])
    return env


def without_addresses(text: str) -> str:
    """Logs are pasted into issues, and an index's address may carry a password."""
    return _INDEX.sub("<address>", text)


def run(command: Sequence[str], advice: str) -> str:
    """The command's output; SetupError with its last lines and the advice if it fails."""
    with subprocess.Popen(
        command, env=environment(os.environ), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        output = _wait(process)
    if process.returncode != 0:
        tail = "\n".join(without_addresses(output).splitlines()[-30:])
        raise SetupError(f"{tail}\n\n{advice}")
    return output


def _wait(process: subprocess.Popen[str]) -> str:
    while True:
        try:
            output, _ = process.communicate(timeout=SIGN_OF_LIFE)
            return output
        except subprocess.TimeoutExpired:
            print(".", end="", flush=True)
        except BaseException:
            process.terminate()
            raise


def say(text: str) -> None:
    print(text, flush=True)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One setup at a time in a checkout. The kernel drops the lock with the process that holds it."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("setup: waiting for another one in this checkout")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
