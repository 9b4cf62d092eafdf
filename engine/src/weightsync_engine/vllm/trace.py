"""Runs a model's own loaders on tensors without memory, and notes which part of which tensor goes where.

While it runs, the model's parameters are replaced by such tensors in the form that checkpoints have; after it the
very same objects are back. It uses parts of vLLM that are not public (the reload package); what they are taken
to do is held by a test for each version that is supported.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.model_loader.reload.layerwise import _get_original_loader, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta, to_meta_tensor

Region = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Offset, shape and strides in elements, within a storage."""


@dataclass
class Source:
    """A tensor of the manifest, and what became of it."""

    name: str
    tensor: torch.Tensor
    used: dict[Region, int] = field(default_factory=dict)
    """Regions that were copied from, with their elements."""
    whole: bool = False
    """It went somewhere through a computation, which is taken to have used all of it."""
    error: str = ""

    @property
    def first(self) -> int:
        """Index of the first element that was used; past the end when none was."""
        if self.whole:
            return 0
        return min((region[0] for region in self.used), default=self.tensor.numel())

    @property
    def end(self) -> int:
        """Index after the last element that was used; 0 when none was."""
        if self.whole:
            return self.tensor.numel()
        return max((_end(region) for region in self.used), default=0)

    @property
    def elements(self) -> int:
        """How many elements were used."""
        return self.tensor.numel() if self.whole else sum(self.used.values())


@dataclass
class Target:
    """A parameter in checkpoint form. ``names``: all under which the model knows it (tied weights have several)."""

    names: list[str]
    tensor: torch.Tensor
    dtypes: set[tuple[str, torch.dtype]] = field(default_factory=set)
    """Which tensors went into it, and their dtypes."""
    written: dict[Region, int] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """How many elements were written."""
        return sum(self.written.values())


@dataclass
class Trace:
    """What a load would do."""

    sources: list[Source]
    targets: list[Target]


def trace(model: torch.nn.Module, tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> Trace:
    """Load ``tensors`` without their bytes. Raises RuntimeError if the live model was not put back as it was."""
    sources = [Source(name, torch.empty(shape, dtype=dtype, device="meta")) for name, dtype, shape in tensors]
    before = _fingerprint(model)
    with _on_meta(model) as targets:
        recorder = _Recorder(sources, targets)
        rest = sources
        while rest:
            rest = _load(model, rest, recorder)
    if _fingerprint(model) != before:
        raise RuntimeError("the model is not what it was before the preflight: restart the engine")
    return Trace(sources, targets)


def _load(model: Any, sources: list[Source], recorder: "_Recorder") -> list[Source]:
    """Load until a tensor is refused; returns those that come after it."""
    given = 0

    def feed() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal given
        for source in sources:
            given += 1
            recorder.present = source
            yield source.name, source.tensor

    try:
        with recorder, torch.no_grad():
            model.load_weights(feed())
    except Exception as error:
        if not given:
            raise
        sources[given - 1].error = f"{type(error).__name__}: {error}".strip(": ")
        return sources[given:]
    return []


@contextmanager
def _on_meta(model: torch.nn.Module) -> Iterator[list[Target]]:
    """Put every layer's tensors into checkpoint form without memory, and back."""
    saved = [
        (layer, dict(layer._parameters), dict(layer._buffers), set(layer._non_persistent_buffers_set))
        for layer in model.modules()
    ]
    names: dict[int, list[str]] = {}
    for name, found in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(found), []).append(name)
    targets: dict[int, Target] = {}
    try:
        for layer, live_parameters, _, _ in saved:
            restore_layer_on_meta(layer, get_layerwise_info(layer))
            for name, parameter in list(layer._parameters.items()):
                if parameter is None:
                    continue
                tensor: Any = parameter if parameter.is_meta else to_meta_tensor(parameter)
                layer._parameters[name] = tensor
                if getattr(tensor, "weight_loader", None) is not None:
                    tensor.weight_loader = _get_original_loader(tensor)
                live = live_parameters.get(name)
                known = names.get(id(live), [name]) if live is not None else [name]
                targets.setdefault(id(tensor), Target(known, tensor))
            for name, buffer in list(layer._buffers.items()):
                if buffer is not None and not buffer.is_meta:
                    layer._buffers[name] = to_meta_tensor(buffer)
        yield list(targets.values())
    finally:
        for layer, parameters, buffers, non_persistent in saved:
            layer._parameters.clear()
            layer._parameters.update(parameters)
            layer._buffers.clear()
            layer._buffers.update(buffers)
            layer._non_persistent_buffers_set.clear()
            layer._non_persistent_buffers_set.update(non_persistent)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes copies from sources into targets; follows a source through views by its storage, else by computation."""

    def __init__(self, sources: list[Source], targets: list[Target]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.present: Source | None = None
        self._sources = {_storage(source.tensor): (source, True) for source in sources}
        self._targets = {_storage(target.tensor): target for target in targets}
        self._kept: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.is_mutable and args and isinstance(args[0], torch.Tensor):
            self._write(args[0], args[1] if len(args) > 1 else None, func is torch.ops.aten.copy_.default)
        elif isinstance(result, torch.Tensor) and _storage(result) not in self._sources:
            self._derive(result, args)
        return result

    def _derive(self, result: torch.Tensor, args: Any) -> None:
        for argument in args:
            found = self._sources.get(_storage(argument)) if isinstance(argument, torch.Tensor) else None
            if found:
                self._sources[_storage(result)] = (found[0], False)
                # A storage's address must not be given to another one while it stands for this tensor.
                self._kept.append(result)
                return

    def _write(self, into: torch.Tensor, value: Any, copies: bool) -> None:
        target = self._targets.get(_storage(into))
        if target is None:
            return
        target.written[_region(into)] = into.numel()
        if not copies or not isinstance(value, torch.Tensor):
            return
        found = self._sources.get(_storage(value))
        source, plain = found or (self.present, False)
        if source is None:
            return
        target.dtypes.add((source.name, source.tensor.dtype))
        if plain:
            source.used[_region(value)] = value.numel()
        else:
            source.whole = True


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _region(tensor: torch.Tensor) -> Region:
    return int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride())


def _end(region: Region) -> int:
    offset, shape, strides = region
    return offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1


def _fingerprint(model: torch.nn.Module) -> list[tuple[str, int, int, tuple[int, ...], tuple[int, ...], Any]]:
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return [
        (name, id(t), 0 if t.is_meta else t.data_ptr(), tuple(t.shape), tuple(t.stride()), t.dtype)
        for name, t in tensors
    ]
