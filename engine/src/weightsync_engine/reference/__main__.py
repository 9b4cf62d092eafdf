"""``python -m weightsync_engine.reference --model DIRECTORY --port PORT``."""

import argparse
import os
from importlib.metadata import version
from pathlib import Path

import torch
import uvicorn
from tokenizers import Tokenizer

from weightsync_contract import logs
from weightsync_engine.boot import boot_id
from weightsync_engine.guard.middleware import DEFAULT_DIRECTORY, DIRECTORY
from weightsync_engine.reference.app import Api
from weightsync_engine.reference.control import Control
from weightsync_engine.reference.core import Core
from weightsync_engine.reference.llama import Llama
from weightsync_engine.worker.arena import open_arena
from weightsync_engine.worker.protocol import Hello
from weightsync_engine.worker.server import WorkerServer
from weightsync_engine.worker.state import WorkerState


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m weightsync_engine.reference", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of a Llama checkpoint, float32")
    parser.add_argument("--served-model-name", default="", help="name in requests (default: the directory)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument(
        "--tensor-parallel-size",
        type=int,
        default=1,
        help="ranks that answer on sockets, all in this process",
    )
    parser.add_argument(
        "--device", default="cpu", help="cpu or cuda; WEIGHTSYNC_ARENA=auto keeps an arena there"
    )
    parser.add_argument("--log-format", choices=logs.FORMATS, default="text")
    arguments = parser.parse_args()
    logs.configure(arguments.log_format)
    # A stand-in shares its machine with others of its kind.
    torch.set_num_threads(1)
    serve(arguments)


def serve(arguments: argparse.Namespace) -> None:
    """Load the model, open the ranks' sockets, listen."""
    model = Llama.read(arguments.model, arguments.device)
    core = Core(model)
    directory = Path(os.environ.get(DIRECTORY, DEFAULT_DIRECTORY))
    size, name = arguments.tensor_parallel_size, f"reference {version('weightsync-engine')}"
    boot = boot_id()
    arena = open_arena(model.device, model.parameters())
    ranks = [WorkerState(Hello(boot, rank, size, name, os.getpid()), arena) for rank in range(size)]
    for rank, state in enumerate(ranks):
        WorkerServer(directory, str(rank), state).start()
    core.start()
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    served = arguments.served_model_name or str(arguments.model)
    app = Api(core, Control(core, ranks), tokenizer, served, size).app()
    uvicorn.run(
        app,
        host=arguments.host,
        port=arguments.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=2,
    )


if __name__ == "__main__":
    main()
