"""Running the steps of a setup: one line a step with its seconds, and errors that say what to do."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

SIGN_OF_LIFE = 10.0
# Settings that an outer environment, a build or a virtual environment leaves behind and that would steer ours.
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
        while True:
            try:
                output, _ = process.communicate(timeout=SIGN_OF_LIFE)
                break
            except subprocess.TimeoutExpired:
                print(".", end="", flush=True)
            except BaseException:
                process.terminate()
                raise
    if process.returncode != 0:
        tail = "\n".join(without_addresses(output).splitlines()[-30:])
        raise SetupError(f"{tail}\n\n{advice}")
    return output


def say(text: str) -> None:
    print(text, flush=True)

