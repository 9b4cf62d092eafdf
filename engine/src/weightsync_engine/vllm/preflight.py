"""Would this manifest load? Asked of the model's own loaders, before a byte of it is there."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from weightsync_contract.manifest import Manifest
from weightsync_engine.vllm.agreement import largest, smallest, total
from weightsync_engine.vllm.load import OUTPUT
from weightsync_engine.vllm.trace import Source, Target, Trace, trace
from weightsync_engine.worker.problems import missing, unknown, wrong_dtype, wrong_shape
from weightsync_engine.worker.protocol import Problem
from weightsync_engine.worker.tensors import dtype_of

_IGNORED: Final = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Tensors of old checkpoints that vLLM computes itself."""

_OPTIONAL: Final = ("k_scale", "v_scale", "q_scale", "prob_scale", "input_scale")
"""Parameters that checkpoints may leave out."""

_MAX_HEADER: Final = 100 << 20


@dataclass(frozen=True)
class Checked:
    """Every reason not to take a manifest, and what loading it would copy where (None: nobody could say)."""

    problems: tuple[Problem, ...]
    found: Trace | None


def check(model: torch.nn.Module, checkpoint: Path, tied: bool, manifest: Manifest) -> Checked:
    """Ask about ``manifest``. All ranks must call it at the same time with the same manifest.

    ``checkpoint`` is where the engine read its model from, for saying what shapes it wants; it need not hold any.
    ``tied``: the output layer is the embedding, and a tensor for it is left aside, as it is when loading.
    """
    specs = [spec for spec in manifest.tensors if not (tied and spec.name.endswith(OUTPUT))]
    tensors = [(spec.name, dtype_of(spec.dtype), spec.shape) for spec in specs]
    found: Trace | None = None
    trouble = ""
    try:
        found = trace(model, tensors)
    except Exception as error:
        trouble = f"{type(error).__name__}: {error}"
    # Before anything that may raise on one rank only: the others wait in here.
    used = _used_by_all(found, len(tensors))
    if found is None:
        what = f"the model's loaders could not be asked ({trouble})"
        return Checked((Problem("manifest", what, "see the engine's log"),), None)
    shapes = _checkpoint_shapes(checkpoint)
    problems: list[Problem] = []
    for source, (elements, first, end) in zip(found.sources, used, strict=True):
        problems += _problems_of(source, elements, first, end, shapes)
    problems += _casts(found)
    refused = {problem.tensor for problem in problems}
    problems += _uncovered(found.targets, refused, shapes, {name for name, _, _ in tensors})
    return Checked(tuple(problems), found)


def _used_by_all(found: Trace | None, count: int) -> list[tuple[int, int, int]]:
    """For each tensor: elements used, counted on all ranks; the first and the end of them over all ranks."""
    sources = found.sources if found else []
    elements = total([source.elements for source in sources] or [0] * count)
    first = smallest([source.first for source in sources] or [0] * count)
    end = largest([source.end for source in sources] or [0] * count)
    return list(zip(elements, first, end, strict=True))


def _problems_of(
    source: Source,
    elements: int,
    first: int,
    end: int,
    shapes: dict[str, tuple[int, ...]],
) -> list[Problem]:
    name, shape, size = source.name, tuple(source.tensor.shape), source.tensor.numel()
    wanted = shapes.get(name)
    if source.error:
        if wanted is None and shapes:
            return [unknown(name)]
        if wanted == shape or (wanted is None and _is_unknown(source.error)):
            return [unknown(name)] if _is_unknown(source.error) else [_loader_says(source)]
        return [wrong_shape(name, shape, wanted, "" if wanted else source.error)]
    if not elements:
        # No rank took any of it, and none objected.
        known = wanted is not None or name.endswith(_IGNORED) or not size
        return [] if known else [unknown(name)]
    if first > 0 or end < size or elements < size:
        return [wrong_shape(name, shape, wanted, "only a part of it would be used")]
    return []


def _is_unknown(error: str) -> bool:
    return error.startswith("KeyError") or "no module or parameter" in error.lower()


def _loader_says(source: Source) -> Problem:
    return Problem(
        source.name, f"the model's loader refuses it ({source.error:.200})", "see the engine's log"
    )


def _casts(found: Trace) -> list[Problem]:
    problems = []
    for target in found.targets:
        for name, dtype in sorted(target.dtypes, key=lambda pair: pair[0]):
            if dtype != target.tensor.dtype:
                problems.append(wrong_dtype(name, _said(dtype), _said(target.tensor.dtype)))
    return problems


def _uncovered(
    targets: list[Target], refused: set[str], shapes: dict[str, tuple[int, ...]], given: set[str]
) -> list[Problem]:
    """Parameters that would keep old values, by the checkpoint's names where those are known."""
    covered = {
        name for target in targets if target.elements >= target.tensor.numel() for name in target.names
    }
    short = [
        target
        for target in targets
        if not target.buffer
        and not covered.intersection(target.names)
        and not target.names[0].endswith(_OPTIONAL)
    ]
    if not short:
        return []
    absent = [name for name in shapes if name not in given]
    if absent:
        return [missing(name) for name in absent]
    # A refused tensor explains a hole where it belongs; without the checkpoint's names there is no telling which.
    if refused:
        return []
    return [
        missing(t.names[0], f"{t.elements} of its {t.tensor.numel()} elements would be loaded") for t in short
    ]


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checkpoint_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name from the headers of the safetensors files in ``directory``; none where there are none."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            shapes |= _header_shapes(path)
        except (OSError, ValueError, KeyError, TypeError, struct.error):
            return {}
    return shapes


def _header_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > _MAX_HEADER:
            raise ValueError("a header of such a size is none")
        header: dict[str, Any] = json.loads(file.read(size))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
