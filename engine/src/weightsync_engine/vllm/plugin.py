"""The entry point. vLLM calls it in its API server, its core and every worker, in some more than once."""

from typing import Final

NAME: Final = "weightsync"


def register() -> None:
    """Make the backend known; its module is imported by the worker that is told to use it, and by no one else."""
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ImportError:
        # A vLLM without weight transfer: it serves as ever, and refuses the option by itself.
        return
    if NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(NAME, f"{__package__}.backend", "WeightSyncBackend")
