"""What a load copies where, once and for all: regions of checkpoint tensors into regions of parameters.

Numbers only. Regions are in elements, within one tensor's memory; a copy's two regions have the same shape.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Final, NamedTuple

WORDS: Final = (4, 2, 1)
"""Bytes of the integers that are copied, the best first: GPUs copy 32 bits at a time four times as fast as 8."""


class Region(NamedTuple):
    """``offset``, ``shape`` and ``strides`` in elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many there are."""
        return prod(self.shape)

    @property
    def end(self) -> int:
        """The index after the last of them; 0 where there are none."""
        if not self.elements:
            return 0
        return (
            self.offset
            + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
            + 1
        )

    @property
    def is_run(self) -> bool:
        """Are they side by side? For a region in its simplest form, as ``simplest`` makes it."""
        return self.shape == () or (len(self.shape) == 1 and self.strides == (1,))


class Place(NamedTuple):
    """A parameter: the module that owns it, and its name there."""

    module: str
    parameter: str


@dataclass(frozen=True, slots=True)
class Copy:
    """Elements of ``itemsize`` bytes, from ``source`` (a tensor's name, or what stands for memory) to ``target``."""

    source: str | int
    read: Region
    target: Place
    write: Region
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Bytes that are copied."""
        return self.write.elements * self.itemsize

    @property
    def is_run(self) -> bool:
        """Contiguous on both sides?"""
        return self.read.is_run and self.write.is_run


def simplest(copy: Copy) -> Copy:
    """The same copy with as few dimensions as can be; a contiguous one has one, of stride 1, on both sides."""
    dims: list[tuple[int, int, int]] = []
    for size, read, write in zip(copy.read.shape, copy.read.strides, copy.write.strides, strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == read * size and dims[-1][2] == write * size:
            dims[-1] = (dims[-1][0] * size, read, write)
        else:
            dims.append((size, read, write))
    if not dims:
        dims = [(copy.read.elements, 1, 1)]
    shape = tuple(size for size, _, _ in dims)
    return replace(
        copy,
        read=Region(copy.read.offset, shape, tuple(read for _, read, _ in dims)),
        write=Region(copy.write.offset, shape, tuple(write for _, _, write in dims)),
    )


def fold(copies: Iterable[Copy]) -> list[Copy]:
    """As few copies as do the same, by target and place.

    Contiguous neighbours on both sides become one. The copies must not overlap in what they write; see ``covers``.
    """
    folded: list[Copy] = []
    ordered = sorted(map(simplest, copies), key=lambda copy: (copy.target, copy.write.offset))
    for copy in ordered:
        if not copy.write.elements:
            continue
        last = folded[-1] if folded else None
        if last is not None and _follows(copy, last):
            shape = (last.write.elements + copy.write.elements,)
            folded[-1] = replace(
                last,
                read=Region(last.read.offset, shape, (1,)),
                write=Region(last.write.offset, shape, (1,)),
            )
        else:
            folded.append(copy)
    return folded


def _follows(copy: Copy, last: Copy) -> bool:
    return (
        (copy.source, copy.target, copy.itemsize) == (last.source, last.target, last.itemsize)
        and copy.is_run
        and last.is_run
        and copy.write.offset == last.write.end
        and copy.read.offset == last.read.end
    )


def covers(regions: Iterable[Region], elements: int) -> bool:
    """Do ``regions`` make up all of a tensor of ``elements``, and none of it twice? Exact for any strides."""
    spans: list[tuple[int, int]] = []
    for region in regions:
        spans += _spans(region)
    at = 0
    for start, end in sorted(spans):
        if start != at:
            return False
        at = end
    return at == elements


def _spans(region: Region) -> list[tuple[int, int]]:
    """The contiguous pieces of a region, as (start, end)."""
    if not region.elements:
        return []
    length = 1
    dims = [(n, stride) for n, stride in zip(region.shape, region.strides, strict=True) if n > 1]
    while dims and dims[-1][1] == length:
        length *= dims.pop()[0]
    starts = [region.offset]
    for size, stride in dims:
        starts = [start + index * stride for start in starts for index in range(size)]
    return [(start, start + length) for start in starts]


def in_words(copy: Copy, read_base: int, write_base: int) -> tuple[int, Region, Region]:
    """The copy in integers of the best size: their bytes, and the two regions in them.

    ``read_base`` and ``write_base`` are the addresses that the regions count from.
    """
    # Bytes within an element are one more dimension; it joins the last one where that is contiguous on both sides.
    joined = copy.read.shape != () and copy.read.strides[-1] == copy.write.strides[-1] == 1
    for word in WORDS:
        read = _region_in_words(copy.read, copy.itemsize, word, read_base, joined)
        write = _region_in_words(copy.write, copy.itemsize, word, write_base, joined)
        if read is not None and write is not None:
            return word, read, write
    raise AssertionError("every region is one of bytes")


def _region_in_words(region: Region, itemsize: int, word: int, base: int, joined: bool) -> Region | None:
    shape, strides = list(region.shape), [stride * itemsize for stride in region.strides]
    if joined:
        shape[-1] *= itemsize
        strides[-1] = 1
    else:
        shape.append(itemsize)
        strides.append(1)
    offset = region.offset * itemsize
    # The memory itself is seen as words, so that its address counts by itself too.
    if base % word or offset % word or shape[-1] % word or any(stride % word for stride in strides[:-1]):
        return None
    shape[-1] //= word
    return Region(offset // word, tuple(shape), (*(s // word for s in strides[:-1]), 1))


def nbytes(copies: Sequence[Copy]) -> int:
    """Bytes of all of them."""
    return sum(copy.nbytes for copy in copies)
