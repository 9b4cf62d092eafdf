"""Starts the inference servers: real vLLM on the CPU, or the reference engine."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from weightsync_demo.processes import Process

KINDS: Final = ("vllm", "reference")
SERVED_NAME: Final = "demo"
_SHUTDOWN_SECONDS: Final = 5


def engine_process(
    kind: str,
    model: Path,
    port: int,
    shared: Path,
    log: Path,
    *,
    tensor_parallel_size: int = 1,
    arguments: Sequence[str] = (),
) -> Process:
    """A server of ``model`` on loopback, not started yet.

    ``shared`` is the directory that it shares with its agent (permit, token, workers' sockets).
    """
    command = [
        *(sys.executable, "-m", "weightsync_engine.reference"),
        *("--model", str(model), "--served-model-name", SERVED_NAME, "--host", "127.0.0.1"),
        *("--port", str(port), "--tensor-parallel-size", str(tensor_parallel_size)),
    ]
    env = {"WEIGHTSYNC_DIR": str(shared)}
    if kind == "vllm":
        command[2] = "vllm.entrypoints.openai.api_server"
        command += _vllm_arguments()
        env |= _vllm_environment(shared, tensor_parallel_size)
    return Process(f"{shared.parent.name}/{kind}", [*command, *arguments], log, env)


def _vllm_arguments() -> list[str]:
    return [
        *("--middleware", "weightsync_engine.guard.Guard"),
        *("--weight-transfer-config", '{"backend":"weightsync"}'),
        *("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8", "--enforce-eager"),
        *("--kv-cache-memory-bytes", "64M", "--shutdown-timeout", str(_SHUTDOWN_SECONDS)),
    ]


def _vllm_environment(shared: Path, tensor_parallel_size: int) -> dict[str, str]:
    env = {
        # Opens the control routes; the guard closes them again to all but the agent.
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(shared.parent / "vllm-cache"),
        "HF_HUB_OFFLINE": "1",
    }
    if tensor_parallel_size > 1:
        # Ranks on one small machine would bind the same cores, and fight for them with their threads.
        env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return env
