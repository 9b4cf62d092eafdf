"""Which modules of a model can be brought to a version by plain copies, and which need vLLM's own loading.

A module goes by the plan where nothing but its parameters holds its weights, these lie as checkpoints have them,
and loading does nothing but copy. Everything else (quantised, packed, computed of, attention) is loaded by vLLM.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from weightsync_engine.vllm.plan import Copy, Place, Region, covers, fold
from weightsync_engine.vllm.trace import Source, Target, Trace

_PLAIN_METHODS: Final = {
    "UnquantizedLinearMethod",
    "UnquantizedEmbeddingMethod",
    "UnquantizedFusedMoEMethod",
}
"""Those whose kernels read the module's own parameters. On CPUs an embedding that is an output layer does not:
it is processed again after each load (see load.py)."""


@dataclass(frozen=True)
class Plan:
    """What one rank copies for a version of one layout, and what it has vLLM load."""

    copies: tuple[Copy, ...]
    """Folded, of ``planned`` modules only."""
    planned: tuple[str, ...]
    slow: dict[str, str]
    """Modules that have parameters and do not go by the plan: why."""
    names: dict[str, frozenset[str]]
    """For each planned module the tensors that go into it."""
    loaded: frozenset[str]
    """Tensors that vLLM has to be given."""
    tensors: tuple[tuple[Place, int, tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    """What planned modules consist of: address, shape, strides and dtype of every parameter and buffer."""

    def without(self, module: str, why: str) -> "Plan":
        """The plan when ``module`` has vLLM load it."""
        return Plan(
            tuple(copy for copy in self.copies if copy.target.module != module),
            tuple(name for name in self.planned if name != module),
            {**self.slow, module: why},
            {name: names for name, names in self.names.items() if name != module},
            self.loaded | self.names[module],
            tuple(row for row in self.tensors if row[0].module != module),
        )

    def holds(self, model: torch.nn.Module) -> bool:
        """Is the model's memory still that which the copies were made for?"""
        return self.tensors == _tensors(model, self.planned)


def make_plan(model: torch.nn.Module, trace: Trace, deferred: Iterable[torch.nn.Module]) -> Plan:
    """Sort the modules. ``deferred``: those that vLLM processes last (attention), whatever was loaded."""
    late = {id(layer) for layer in deferred}
    targets: dict[str, list[Target]] = {}
    for target in trace.targets:
        targets.setdefault(target.place.module, []).append(target)
    planned: list[str] = []
    slow: dict[str, str] = {}
    for name, layer in model.named_modules():
        own = targets.get(name, [])
        if not any(target.written or target.opaque for target in own):
            # Nothing is loaded into it: it shares its weights, or has none.
            continue
        why = "attention" if id(layer) in late else _why_slow(layer, own)
        if why:
            slow[name] = why
        else:
            planned.append(name)
    chosen = set(planned)
    copies = [copy for t in trace.targets if t.place.module in chosen for copy in t.copies]
    names: dict[str, set[str]] = {name: set() for name in planned}
    for copy in copies:
        names[copy.target.module].add(str(copy.source))
    return Plan(
        tuple(fold(copies)),
        tuple(planned),
        slow,
        {name: frozenset(sources) for name, sources in names.items()},
        frozenset(source.name for source in trace.sources if _needs_loading(source, chosen)),
        _tensors(model, planned),
    )


def _why_slow(layer: Any, targets: list[Target]) -> str:
    method = getattr(layer, "quant_method", None)
    if isinstance(method, QuantizeMethodBase) and type(method).__name__ not in _PLAIN_METHODS:
        return f"{type(method).__name__} may keep weights in a form of its own"
    for target in targets:
        name = target.place.parameter
        if target.buffer:
            if target.written or target.opaque:
                return f"{name} is a buffer that is loaded"
            continue
        if target.opaque:
            return f"{name}: {target.opaque}"
        if not target.same_layout:
            return f"{name} is kept in another layout than checkpoints have"
        regions: list[Region] = [copy.write for copy in target.copies] + target.filled
        if not covers(regions, target.tensor.numel()):
            return f"{name} is loaded in part only, or in parts that overlap"
    return ""


def _needs_loading(source: Source, planned: set[str]) -> bool:
    """Is anything done with it besides copies into ``planned`` modules?"""
    if not source.places:
        # What nobody so much as looked at is nobody's: another pipeline rank has it.
        return source.touched
    return source.derived or source.whole or any(place.module not in planned for place in source.places)


def _tensors(
    model: torch.nn.Module, names: Iterable[str]
) -> tuple[tuple[Place, int, tuple[int, ...], tuple[int, ...], torch.dtype], ...]:
    modules = dict(model.named_modules())
    rows = []
    for name in names:
        layer = modules.get(name)
        if layer is None:
            continue
        for own, tensor in [*layer._parameters.items(), *layer._buffers.items()]:
            if tensor is not None:
                shape, strides = tuple(tensor.shape), tuple(tensor.stride())
                rows.append((Place(name, own), tensor.data_ptr(), shape, strides, tensor.dtype))
    return tuple(rows)
