"""How an agent is told where it is: flags, each with an environment variable as its fallback."""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from weightsync_contract import logs
from weightsync_contract.messages import PodRef
from weightsync_contract.reasons import Role

_UNITS: Final = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}

_DESCRIPTION: Final = """\
Keep one inference pod on its trainer's newest weights, or give a trainer's weights to its inference pods.

The agent runs beside a trainer or an inference engine. It dials the operator, which says whom to transfer
with and when to switch; it alone decides when its engine may answer, also while the operator is away."""

_EPILOG: Final = """\
files in --directory, shared with the engine or trainer:
  permit          written here: which boot of the engine may answer, and from which version
  control-token   written here: opens the engine's control routes
  workers/        sockets of the engine's workers
  publish.sock    made here (trainer): where publish() of weightsync_engine.client connects
files in --state-directory, for this agent alone:
  journal         what must survive a restart of the agent
  versions/       copies of published versions (trainer)

The agent ends by SIGTERM. Neither its end nor its restart interrupts the engine."""


@dataclass(frozen=True, slots=True)
class Config:
    """Everything an agent is told when it starts."""

    role: Role
    operator: str
    operator_ca: Path | None
    token_file: Path
    pod: PodRef
    pod_ip: str
    directory: Path
    state_directory: Path
    engine_url: str
    limit_rate: int
    """Bytes a second that a sender puts on the wire; 0 for no limit."""
    health_port: int | None
    log_format: str
    log_level: str


def parse(arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> Config:
    """Read the command line. Exits with a message when something is missing or wrong, as argparse does."""
    parser = argparse.ArgumentParser(
        prog="weightsync-agent",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(flag: str, variable: str, text: str, default: str | None = None, **more: object) -> None:
        value = environment.get(variable) or default
        parser.add_argument(
            flag,
            default=value,
            required=value is None,
            help=f"{text} [{variable}{f', default {default}' if default else ''}]",
            **more,  # type: ignore[arg-type]
        )

    roles = [str(role) for role in Role]
    add("--role", "WEIGHTSYNC_ROLE", f"{' or '.join(roles)}", choices=roles)
    add(
        "--operator",
        "WEIGHTSYNC_OPERATOR",
        "operator's session, ws://HOST:PORT or wss://HOST:PORT",
        type=_session,
    )
    add(
        "--operator-ca",
        "WEIGHTSYNC_OPERATOR_CA",
        "bundle that the operator's certificate is checked with",
        "",
    )
    add("--token-file", "WEIGHTSYNC_TOKEN_FILE", "pod-bound token, read again at each dial", type=Path)
    add("--namespace", "POD_NAMESPACE", "this pod's namespace")
    add("--pod-name", "POD_NAME", "this pod's name")
    add("--pod-uid", "POD_UID", "this pod's uid")
    add("--pod-ip", "POD_IP", "where other pods reach this one; a trainer's transfer group listens there")
    add("--directory", "WEIGHTSYNC_DIR", "shared with the engine or trainer", "/run/weightsync", type=Path)
    add(
        "--state-directory",
        "WEIGHTSYNC_STATE_DIR",
        "this agent's own, on a disk that outlives it",
        "/var/lib/weightsync",
        type=Path,
    )
    add("--engine-url", "WEIGHTSYNC_ENGINE_URL", "the engine's HTTP server", "http://127.0.0.1:8000")
    add(
        "--limit-rate",
        "WEIGHTSYNC_LIMIT_RATE",
        "most bytes a second that a trainer sends, as 20MiB",
        "0",
        type=_rate,
    )
    add(
        "--health-port",
        "WEIGHTSYNC_HEALTH_PORT",
        "serve /healthz, /readyz and /observed there",
        "",
        type=_port,
    )
    add("--log-format", "WEIGHTSYNC_LOG_FORMAT", "how events are logged", "text", choices=list(logs.FORMATS))
    add(
        "--log-level",
        "WEIGHTSYNC_LOG_LEVEL",
        "least that is logged",
        "INFO",
        choices=["DEBUG", "INFO", "WARNING"],
    )
    given = parser.parse_args(arguments)
    return Config(
        role=Role(given.role),
        operator=given.operator,
        operator_ca=Path(given.operator_ca) if given.operator_ca else None,
        token_file=given.token_file,
        pod=PodRef(given.namespace, given.pod_name, given.pod_uid),
        pod_ip=given.pod_ip,
        directory=given.directory,
        state_directory=given.state_directory,
        engine_url=given.engine_url.rstrip("/"),
        limit_rate=given.limit_rate,
        health_port=given.health_port,
        log_format=given.log_format,
        log_level=given.log_level,
    )


def _session(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("ws", "wss") or not parts.hostname:
        raise argparse.ArgumentTypeError(f"{text!r} is no ws://HOST:PORT or wss://HOST:PORT")
    return text


def _rate(text: str) -> int:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate: give bytes a second, as 20MiB or 500000")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _port(text: str) -> int | None:
    if not text:
        return None
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give 0 to 65535")
    return int(text)
