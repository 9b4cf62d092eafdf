"""``python -m weightsync_engine.reference``: a small torch server that speaks vLLM's routes."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from tokenizers import Tokenizer

from weightsync_engine.boot import boot_id
from weightsync_engine.guard import Guard
from weightsync_engine.guard.middleware import DEFAULT_DIRECTORY, DIRECTORY
from weightsync_engine.reference.backend import Backend
from weightsync_engine.reference.completions import Completions
from weightsync_engine.reference.engine import Engine
from weightsync_engine.reference.model import Llama
from weightsync_engine.reference.routes import Routes
from weightsync_engine.worker.protocol import Hello
from weightsync_engine.worker.server import WorkerServer
from weightsync_engine.worker.state import WorkerState


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m weightsync_engine.reference",
        description="Serve a Llama checkpoint with vLLM's routes, greedy and in float32, to try weightsync "
        f"where vLLM has no wheel. The directory shared with the agent comes from {DIRECTORY} "
        f"(default: {DEFAULT_DIRECTORY}).",
    )
    parser.add_argument("--model", type=Path, required=True, help="directory of a Hugging Face checkpoint")
    parser.add_argument("--served-model-name", default="reference", help="its name in answers")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: loopback)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (default: 8000)")
    parser.add_argument(
        "--tensor-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="answer as N ranks would, each at its own socket; the arithmetic stays one process's",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM."""
    options = parse(arguments)
    directory = Path(os.environ.get(DIRECTORY) or DEFAULT_DIRECTORY)
    size = options.tensor_parallel_size
    model = Llama(options.model)
    ranks = [WorkerState(Hello(boot_id(), rank, size, "reference", os.getpid())) for rank in range(size)]
    for rank, state in enumerate(ranks):
        WorkerServer(directory, str(rank), state).start()
    engine = Engine(model)
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    completions = Completions(engine, tokenizer, options.served_model_name)
    routes = Routes(engine, Backend(model, ranks), options.served_model_name, size)
    application = Guard(routes.application(completions))
    uvicorn.run(application, host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
