"""Running a command of the machine."""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from weightsync_cluster.errors import ClusterError


def run(
    command: Sequence[str | Path],
    *,
    stdin: str = "",
    timeout: float = 30.0,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> str:
    """What `command` wrote to its output; ClusterError with its errors if it fails or outlasts `timeout` s."""
    shown = " ".join(str(word) for word in command)
    try:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env=environment,
            cwd=directory,
        )
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"no end after {timeout:g} s: {shown}") from error
    except FileNotFoundError as error:
        raise ClusterError(f"{error.filename} is not on this machine: install it") from error
    if done.returncode != 0:
        raise ClusterError(f"{shown}: {(done.stderr or done.stdout).strip()[-3000:]}")
    return done.stdout
