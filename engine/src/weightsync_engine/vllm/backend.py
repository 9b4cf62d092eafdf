"""vLLM's weight transfer backend: nothing is received here, a verified image in memory is applied or refused."""

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.version import __version__

from weightsync_contract.manifest import Manifest
from weightsync_engine.boot import boot_id
from weightsync_engine.guard.middleware import DEFAULT_DIRECTORY, DIRECTORY
from weightsync_engine.vllm.agreement import all_ranks
from weightsync_engine.vllm.load import Loaded, Loader, is_tied
from weightsync_engine.vllm.preflight import check
from weightsync_engine.worker.arena import open_arena
from weightsync_engine.worker.protocol import Hello, Problem
from weightsync_engine.worker.server import WorkerServer
from weightsync_engine.worker.session import UpdateSession, image_of
from weightsync_engine.worker.state import WorkerState

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.weight_transfer import WeightTransferConfig


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Which manifest to check: the one that the agent has sent over the worker's socket."""

    layout: str


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Which image to apply at finish: the one that the agent has attached over the worker's socket."""

    run: str
    version: int
    layout: str
    digest: str


class WeightSyncBackend(WeightTransferEngine[InitInfo, UpdateInfo]):  # type: ignore[misc]
    """One a worker. It costs nothing until an agent asks: a thread that waits on a socket."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(
        self,
        config: "WeightTransferConfig",
        vllm_config: "VllmConfig",
        device: torch.device,
        model: torch.nn.Module,
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        parallel = vllm_config.parallel_config
        if parallel.data_parallel_size > 1:
            raise ValueError(
                "weightsync updates one data parallel rank an engine in this release: start an engine (a pod) each"
            )
        rank, size = parallel.rank, parallel.world_size
        hello = Hello(boot_id(), rank, size, f"vllm {__version__}", os.getpid())
        # Before vLLM measures what is left for its KV cache.
        state = WorkerState(hello, open_arena(device, model.parameters()))
        self._session = UpdateSession(state, self._check, self._load)
        self._server = WorkerServer(Path(os.environ.get(DIRECTORY, DEFAULT_DIRECTORY)), str(rank), state)
        self._loader = Loader(model, self.model_config, device, _no_plan(vllm_config))
        self._server.start()

    @property
    def loaded(self) -> Loaded | None:
        """How the last version came into the model: modules and bytes by the plan and by vLLM, and the time."""
        return self._loader.last

    # Of vLLM up to 0.27.1 an abstract method; the trainer never sends to this backend.
    @staticmethod
    def trainer_send_weights(*_: Any, **__: Any) -> None:
        """Not how weights get here. Always raises RuntimeError."""
        raise RuntimeError("publish with weightsync_engine.client")

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Check a manifest against the model, with nothing that serves touched; the result is on the socket."""
        with set_current_vllm_config(self.vllm_config):
            self._session.preflight(init_info.layout)

    def start_weight_update(self) -> None:
        """Nothing is touched before finish."""
        self._session.start()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Name the image that finish applies."""
        self._session.receive(image_of(asdict(update_info)))

    def finish_weight_update(self) -> None:
        """Apply the image on all ranks or on none; the socket says which."""
        self._session.complete(all_ranks(self._session.begin()))

    def shutdown(self) -> None:
        """The socket stays: it belongs to the worker's life, not to a trainer's connection."""

    def _check(self, manifest: Manifest) -> tuple[Problem, ...]:
        # Asked again for what is known already: serving must not wait for a trace. All ranks must say so.
        if all_ranks(self._loader.knows(manifest.layout)):
            return ()
        checked = check(self.model, Path(self.model_config.model), is_tied(self.model_config), manifest)
        if checked.found is None or checked.problems:
            self._loader.forget("the manifest was refused")
        else:
            self._loader.record(manifest.layout, checked.found)
        return checked.problems

    def _load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._loader.load(tensors)


def _no_plan(vllm_config: "VllmConfig") -> str:
    """Why the weights' places may change or mean something else, so that nothing may rest on them."""
    if vllm_config.lora_config is not None:
        return "LoRA wraps the model's layers"
    if getattr(vllm_config.parallel_config, "enable_eplb", False):
        return "experts move between ranks (enable_eplb)"
    return ""
