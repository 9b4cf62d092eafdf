"""Runs a model's own loaders on tensors without memory, and notes which part of which tensor goes where.

It answers two questions at once: would these tensors load (preflight), and what would be copied (the plan).

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

from weightsync_engine.vllm.plan import Copy, Place, Region

_FILLS = {torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default}
"""Writes of a constant: what is there already after the first load need not be written again."""


@dataclass
class Source:
    """A tensor of the manifest, and what became of it."""

    name: str
    tensor: torch.Tensor
    used: dict[Region, int] = field(default_factory=dict)
    """Regions that were copied from, with their elements."""
    whole: bool = False
    """It went somewhere through a computation, which is taken to have used all of it."""
    touched: bool = False
    """Anything at all was done with it."""
    derived: bool = False
    """Something was computed of it."""
    places: set[Place] = field(default_factory=set)
    """Where it went."""
    error: str = ""

    @property
    def first(self) -> int:
        """Index of the first element that was used; past the end when none was."""
        if self.whole:
            return 0
        return min((region.offset for region in self.used), default=self.tensor.numel())

    @property
    def end(self) -> int:
        """Index after the last element that was used; 0 when none was."""
        if self.whole:
            return self.tensor.numel()
        return max((region.end for region in self.used), default=0)

    @property
    def elements(self) -> int:
        """How many elements were used."""
        return self.tensor.numel() if self.whole else sum(self.used.values())


@dataclass
class Target:
    """A parameter in checkpoint form. ``names``: all under which the model knows it (tied weights have several)."""

    names: list[str]
    tensor: torch.Tensor
    place: Place
    buffer: bool = False
    same_layout: bool = False
    """Has the live parameter the very shape, strides and dtype that the checkpoint form has?"""
    dtypes: set[tuple[str, torch.dtype]] = field(default_factory=set)
    """Which tensors went into it, and their dtypes."""
    written: dict[Region, int] = field(default_factory=dict)
    copies: list[Copy] = field(default_factory=list)
    filled: list[Region] = field(default_factory=list)
    """What was set to a constant."""
    opaque: str = ""
    """What was done with it besides plain copies and constants; empty: nothing."""

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
    before = fingerprint(model)
    with _on_meta(model) as targets:
        recorder = _Recorder(sources, targets)
        rest = sources
        while rest:
            rest = _load(model, rest, recorder)
        recorder.end()
    if fingerprint(model) != before:
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
        (name, layer, dict(layer._parameters), dict(layer._buffers), set(layer._non_persistent_buffers_set))
        for name, layer in model.named_modules()
    ]
    names: dict[int, list[str]] = {}
    for name, found in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(found), []).append(name)
    targets: dict[int, Target] = {}
    try:
        for module, layer, live_parameters, _, _ in saved:
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
                place = Place(module, name)
                same = live is not None and _layout(live) == _layout(tensor)
                targets.setdefault(id(tensor), Target(known, tensor, place, same_layout=same))
            for name, buffer in list(layer._buffers.items()):
                if buffer is None:
                    continue
                layer._buffers[name] = kept = buffer if buffer.is_meta else to_meta_tensor(buffer)
                known = [f"{module}.{name}" if module else name]
                targets.setdefault(id(kept), Target(known, kept, Place(module, name), buffer=True))
        yield list(targets.values())
    finally:
        for _, layer, parameters, buffers, non_persistent in saved:
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

    def end(self) -> None:
        """Note which parameters were given other memory, which no operation shows."""
        for storage, target in self._targets.items():
            now = _storage(target.tensor)
            if now != storage:
                target.opaque = "its memory was replaced"
                if now in self._sources:
                    self._sources[now][0].touched = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._touch(args)
        if func._schema.is_mutable and args and isinstance(args[0], torch.Tensor):
            self._write(func, args[0], args[1] if len(args) > 1 else None)
        elif isinstance(result, torch.Tensor) and _storage(result) not in self._sources:
            self._derive(func, result, args)
        return result

    def _touch(self, args: Any) -> None:
        for argument in args:
            # A list: what is stacked or concatenated.
            for tensor in argument if isinstance(argument, (list, tuple)) else (argument,):
                if isinstance(tensor, torch.Tensor) and (found := self._sources.get(_storage(tensor))):
                    found[0].touched = True

    def _derive(self, func: Any, result: torch.Tensor, args: Any) -> None:
        for argument in args:
            if not isinstance(argument, torch.Tensor):
                continue
            target = self._targets.get(_storage(argument))
            if target is not None and _storage(result) != _storage(argument):
                target.opaque = target.opaque or f"{func} was computed of it"
            found = self._sources.get(_storage(argument))
            if found:
                found[0].derived = True
                self._sources[_storage(result)] = (found[0], False)
                # A storage's address must not be given to another one while it stands for this tensor.
                self._kept.append(result)
                return

    def _write(self, func: Any, into: torch.Tensor, value: Any) -> None:
        target = self._targets.get(_storage(into))
        if target is None:
            changed = self._sources.get(_storage(into))
            if changed:
                # From here on it is no longer what was published.
                changed[0].derived = True
                self._sources[_storage(into)] = (changed[0], False)
            return
        region = _region(into)
        target.written[region] = into.numel()
        if func in _FILLS and not isinstance(value, torch.Tensor):
            target.filled.append(region)
            return
        if func is not torch.ops.aten.copy_.default or not isinstance(value, torch.Tensor):
            target.opaque = target.opaque or f"{func} was done to it"
            return
        found = self._sources.get(_storage(value))
        source, plain = found or (self.present, False)
        if source is None:
            target.opaque = target.opaque or "something of no tensor was copied into it"
            return
        target.dtypes.add((source.name, source.tensor.dtype))
        source.places.add(target.place)
        if plain:
            source.used[_region(value)] = value.numel()
        else:
            source.whole = True
        if not plain:
            target.opaque = target.opaque or f"something computed of {source.name} was copied into it"
        elif into.shape != value.shape or into.dtype != value.dtype or value.dtype != source.tensor.dtype:
            target.opaque = target.opaque or f"{source.name} was spread or cast into it"
        else:
            read = _region(value)
            target.copies.append(Copy(source.name, read, target.place, region, value.element_size()))


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _region(tensor: torch.Tensor) -> Region:
    return Region(int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))


def _layout(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def fingerprint(model: torch.nn.Module) -> list[tuple[str, int, int, tuple[int, ...], tuple[int, ...], Any]]:
    """Which tensors a model has: names, objects, addresses, shapes, strides and dtypes."""
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return [
        (name, id(t), 0 if t.is_meta else t.data_ptr(), tuple(t.shape), tuple(t.stride()), t.dtype)
        for name, t in tensors
    ]
