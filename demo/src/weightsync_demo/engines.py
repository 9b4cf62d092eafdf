"""Starts inference engines as processes: real vLLM on the CPU, or the reference engine."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from weightsync_demo.processes import Process

SERVED_MODEL: Final = "demo"
"""The model's name in requests, whatever serves it."""

ENGINES: Final = ("vllm", "reference")

VLLM_SETTINGS: Final = {
    "VLLM_SERVER_DEV_MODE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # Several servers share few cores here: each pinned to the first one would be far slower.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}


def engine_process(
    kind: str,
    model: Path,
    port: int,
    shared: Path,
    log: Path,
    *,
    ranks: int = 1,
    arguments: Sequence[str] = (),
) -> Process:
    """An engine of ``kind`` (one of ENGINES) on a loopback port, not started yet.

    ``model`` is the checkpoint's directory, ``shared`` the one that it has in common with its agent, ``ranks`` its
    tensor parallel size, ``arguments`` more of the engine's own. vLLM's cache is kept for the user: the second
    start is quicker.
    """
    command, settings = _COMMANDS[kind](model, port, ranks)
    env = {**settings, "WEIGHTSYNC_DIR": str(shared)}
    return Process(f"{log.parent.name}/{kind}", [*command, *arguments], log, env)


def vllm_command(model: str, port: int, ranks: int = 1, host: str = "127.0.0.1") -> list[str]:
    """Arguments of Python for vLLM on the CPU; VLLM_SETTINGS belong to it."""
    return [
        *("-m", "vllm.entrypoints.openai.api_server", "--model", model),
        *("--served-model-name", SERVED_MODEL, "--host", host, "--port", str(port)),
        *("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "4", "--enforce-eager"),
        *("--kv-cache-memory-bytes", "64M", "--shutdown-timeout", "5"),
        *("--tensor-parallel-size", str(ranks), "--disable-uvicorn-access-log"),
        *("--middleware", "weightsync_engine.guard.Guard"),
        *("--weight-transfer-config", json.dumps({"backend": "weightsync"})),
    ]


def reference_command(model: str, port: int, ranks: int = 1, host: str = "127.0.0.1") -> list[str]:
    """Arguments of Python for the reference engine."""
    return [
        *("-m", "weightsync_engine.reference", "--model", model, "--served-model-name", SERVED_MODEL),
        *("--host", host, "--port", str(port), "--tensor-parallel-size", str(ranks)),
    ]


def _vllm(model: Path, port: int, ranks: int) -> tuple[list[str], Mapping[str, str]]:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    settings = {**VLLM_SETTINGS, "VLLM_CACHE_ROOT": str(cache / "weightsync" / "vllm")}
    return [sys.executable, *vllm_command(str(model), port, ranks)], settings


def _reference(model: Path, port: int, ranks: int) -> tuple[list[str], Mapping[str, str]]:
    return [sys.executable, *reference_command(str(model), port, ranks)], {}


_COMMANDS: Final = {"vllm": _vllm, "reference": _reference}
