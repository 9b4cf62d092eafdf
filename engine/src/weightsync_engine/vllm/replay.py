"""Makes a plan's copies, all at once, between tensors that are there; on the host and on a device alike."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

from weightsync_engine.vllm.plan import Copy, Place, Region, fold, in_words

_WORD: Final = {4: torch.int32, 2: torch.int16, 1: torch.uint8}

COMPARED_WORDS: Final = 4 << 20
"""Integers that are compared at once: what a comparison allocates stays small."""


@dataclass(frozen=True)
class Pair:
    """Two views of equal shape and integer dtype."""

    place: Place
    into: torch.Tensor
    value: torch.Tensor
    is_run: bool
    """Both contiguous, of one dimension."""


def bind(
    copies: Sequence[Copy], sources: Mapping[str, torch.Tensor], parameters: Mapping[Place, torch.Tensor]
) -> list[Pair]:
    """Views for each copy.

    Neighbours in ``sources`` that share one memory are joined, as those of one tensor are already. A source must
    be contiguous. Raises KeyError for a tensor or parameter that is not there.
    """
    memories: dict[int, torch.UntypedStorage] = {}
    placed: list[Copy] = []
    for copy in copies:
        tensor = sources[str(copy.source)]
        if not tensor.is_contiguous() or tensor.element_size() != copy.itemsize:
            raise ValueError(f"{copy.source} is not the contiguous tensor that the plan was made for")
        storage = tensor.untyped_storage()
        memories[storage._cdata] = storage
        read = copy.read._replace(offset=copy.read.offset + int(tensor.storage_offset()))
        placed.append(replace(copy, source=storage._cdata, read=read))
    pairs = []
    for copy in fold(placed):
        value, into = memories[int(copy.source)], parameters[copy.target]
        write = copy.write._replace(offset=copy.write.offset + int(into.storage_offset()))
        into_storage = into.untyped_storage()
        word, read, write = in_words(replace(copy, write=write), value.data_ptr(), into_storage.data_ptr())
        pairs.append(
            Pair(
                copy.target,
                _view(into_storage, write, word, into.device),
                _view(value, read, word, value.device),
                copy.is_run,
            )
        )
    return pairs


def copy_all(pairs: Sequence[Pair]) -> None:
    """Copy. Does not wait for a device to be done."""
    runs: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for pair in pairs:
        if pair.is_run:
            into, values = runs.setdefault(pair.into.dtype, ([], []))
            into.append(pair.into)
            values.append(pair.value)
        else:
            # One odd stride in a list would make each of its copies a launch of its own.
            pair.into.copy_(pair.value, non_blocking=True)
    for into, values in runs.values():
        torch._foreach_copy_(into, values, non_blocking=True)


def differing(pairs: Sequence[Pair]) -> set[str]:
    """Modules in which the copies would change a bit: what is there is not what the plan would put there."""
    found: set[str] = set()
    for pair in pairs:
        if pair.place.module not in found and not all(
            torch.equal(into, value.to(into.device)) for into, value in _pieces(pair)
        ):
            found.add(pair.place.module)
    return found


def _pieces(pair: Pair) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    rows = pair.into.shape[0]
    step = max(1, COMPARED_WORDS * rows // max(1, pair.into.numel()))
    for start in range(0, rows, step):
        yield pair.into[start : start + step], pair.value[start : start + step]


def _view(storage: torch.UntypedStorage, region: Region, word: int, device: torch.device) -> torch.Tensor:
    empty = torch.empty(0, dtype=_WORD[word], device=device)
    return empty.set_(storage, region.offset, region.shape, region.strides)
