"""The reference engine's weight transfer backend: checks, takes and applies what its agent staged."""

import math
import warnings
from typing import Any

import torch

from weightsync_contract.manifest import Manifest
from weightsync_contract.messages import VersionId
from weightsync_engine.reference.model import Llama
from weightsync_engine.worker.protocol import Image, Problem
from weightsync_engine.worker.state import Attached, RefusedError, WorkerState

_DTYPE = "float32"


class Backend:
    """One model behind as many ranks as the engine says it has; all agree, or none applies.

    Every method runs between two steps of the engine. What an agent may get wrong is never raised but told at
    the ranks' sockets, as the vLLM backend has to do it.
    """

    def __init__(self, model: Llama, ranks: list[WorkerState]) -> None:
        self._model = model
        self._ranks = ranks
        self._taken: tuple[Image, list[Attached]] | None = None

    def init_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Check the kept manifest of a layout against the model."""
        layout = str(init_info.get("layout", ""))
        for rank in self._ranks:
            manifest = rank.manifest(layout)
            if manifest is not None:
                rank.checked(layout, tuple(problems(manifest, self._model.shape.parameters())))

    def start_weight_update(self) -> None:
        """Forget an update that came to nothing."""
        self._let_go("another update began")

    def receive_weights(self, update_info: dict[str, Any]) -> None:
        """Take the attached image on all ranks, or on none."""
        image = Image(
            VersionId(update_info["run"], update_info["version"]),
            update_info["layout"],
            update_info["digest"],
        )
        self._let_go("another update began")
        taken: list[Attached] = []
        for rank in self._ranks:
            try:
                taken.append(rank.begin(image))
            except RefusedError as error:
                for other in self._ranks[: len(taken)]:
                    other.end(None, f"another rank refused: {error}")
                rank.refuse(str(error))
                return
        self._taken = image, taken

    def finish_weight_update(self) -> None:
        """Apply what was taken; nothing when nothing was."""
        if self._taken is None:
            return
        image, taken = self._taken
        self._taken = None
        for rank in self._ranks:
            rank.touching()
        try:
            self._apply(taken[0])
        except Exception as error:
            for rank in self._ranks:
                rank.end(None, f"the apply failed: {error!r}")
            raise
        for rank in self._ranks:
            rank.end(image)

    def shutdown(self) -> None:
        """Let go of everything."""
        self._let_go("shut down")

    def _let_go(self, why: str) -> None:
        if self._taken is not None:
            self._taken = None
            for rank in self._ranks:
                rank.end(None, why)

    def _apply(self, attached: Attached) -> None:
        manifest = attached.manifest
        with warnings.catch_warnings():
            # torch warns of memory that it may not write: it is only read here.
            warnings.simplefilter("ignore", UserWarning)
            for spec, offset in zip(manifest.tensors, manifest.offsets, strict=True):
                if not spec.nbytes:
                    continue
                found = torch.frombuffer(
                    attached.memory, dtype=torch.float32, count=math.prod(spec.shape), offset=offset
                )
                self._model.weights[spec.name].copy_(found.view(spec.shape))


def problems(manifest: Manifest, expected: dict[str, tuple[int, ...]]) -> list[Problem]:
    """Everything that stands between a manifest and a model of these parameters."""
    found, given = [], {spec.name: spec for spec in manifest.tensors}
    for spec in manifest.tensors:
        shape = expected.get(spec.name)
        if shape is None:
            found.append(
                Problem(spec.name, "the model has no such tensor", "publish it under the model's name")
            )
        elif shape != spec.shape:
            what = f"it has shape {list(spec.shape)}, the model's {list(shape)}"
            found.append(Problem(spec.name, what, "publish the model that the servers run"))
        elif spec.dtype != _DTYPE:
            what = f"it has dtype {spec.dtype}, the model's {_DTYPE}"
            found.append(Problem(spec.name, what, f"publish it as {_DTYPE}"))
    for name in expected:
        if name not in given:
            found.append(Problem(name, "it is missing", "publish all tensors of the model"))
    return found
