"""The arithmetic of a load plan, held against torch on made-up loads."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightsync_engine.vllm.plan import Copy, Place, Region, covers, fold, in_words, nbytes, simplest

PLACE, OTHER = Place("layers.0.mlp", "weight"), Place("layers.0.mlp", "bias")


def run(source, read, write, length, place=PLACE, itemsize=2) -> Copy:
    return Copy(source, Region(read, (length,), (1,)), place, Region(write, (length,), (1,)), itemsize)


def test_neighbours_on_both_sides_are_one_copy():
    assert fold([run("a", 4, 14, 6), run("a", 0, 10, 4)]) == [run("a", 0, 10, 10)]


@pytest.mark.parametrize(
    "second",
    [
        run("b", 4, 14, 6),  # another tensor
        run("a", 5, 14, 6),  # a gap where it is read
        run("a", 4, 15, 6),  # a gap where it is written
        run("a", 4, 14, 6, OTHER),
        run("a", 4, 14, 6, itemsize=4),
    ],
)
def test_others_are_not(second):
    assert len(fold([run("a", 0, 10, 4), second])) == 2


def test_a_strided_copy_joins_nobody():
    half = Copy("a", Region(0, (3, 2), (4, 1)), PLACE, Region(0, (3, 2), (2, 1)), 2)
    assert fold([half, run("a", 12, 6, 2)]) == [half, run("a", 12, 6, 2)]


def test_empty_copies_go():
    assert fold([run("a", 0, 0, 0)]) == []


def test_dimensions_that_are_contiguous_on_both_sides_are_one():
    whole = Region(5, (2, 1, 3, 4), (12, 99, 4, 1))
    assert simplest(Copy("a", whole, PLACE, whole, 2)).write == Region(5, (24,), (1,))
    one = Region(7, (), ())
    assert simplest(Copy("a", one, PLACE, one, 2)).is_run


def test_bytes_are_counted():
    assert nbytes([run("a", 0, 0, 3), run("b", 0, 3, 5, itemsize=4)]) == 26


@pytest.mark.parametrize(
    ("regions", "elements", "covered"),
    [
        ([], 0, True),
        ([], 1, False),
        ([Region(0, (2, 3), (3, 1))], 6, True),
        ([Region(0, (2, 3), (3, 1))], 7, False),
        ([Region(0, (4,), (1,)), Region(3, (3,), (1,))], 6, False),
        ([Region(0, (4,), (1,)), Region(4, (2,), (1,))], 6, True),
        ([Region(0, (2, 2), (4, 1)), Region(2, (2, 2), (4, 1))], 8, True),
        ([Region(0, (2, 2), (4, 1)), Region(1, (2, 2), (4, 1))], 8, False),
        ([Region(0, (2, 4), (0, 1))], 8, False),
    ],
)
def test_what_covers_a_tensor(regions, elements, covered):
    assert covers(regions, elements) is covered


def test_words_are_as_large_as_addresses_allow():
    assert in_words(run("a", 0, 2, 6), 64, 64) == (4, Region(0, (3,), (1,)), Region(1, (3,), (1,)))
    assert in_words(run("a", 1, 2, 6), 64, 64)[0] == 2
    assert in_words(run("a", 0, 2, 5), 64, 64)[0] == 2
    assert in_words(run("a", 0, 2, 6), 66, 64)[0] == 2
    assert in_words(run("a", 0, 2, 6, itemsize=1), 64, 64)[0] == 2
    assert in_words(run("a", 0, 3, 6, itemsize=1), 64, 64)[0] == 1
    # Every second element: its bytes are a dimension of their own.
    odd = Copy("a", Region(0, (3,), (2,)), PLACE, Region(0, (3,), (1,)), 8)
    word, read, _ = in_words(odd, 0, 0)
    assert (word, read) == (4, Region(0, (3, 2), (4, 1)))


SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@settings(max_examples=200, deadline=None)
@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=4),
    dtype=st.sampled_from(["uint8", "bfloat16", "float32", "float64", "float8_e4m3fn"]),
    seed=st.integers(0, 2**32),
    shared=st.booleans(),
)
def test_replay_does_what_the_loads_did(shapes, dtype, seed, shared):
    """Tensors are cut along random dimensions and put into parameters in random order, as fused layers are."""
    torch = pytest.importorskip("torch")
    from weightsync_engine.vllm.replay import bind, copy_all, differing

    rng = random.Random(seed)
    kind = getattr(torch, dtype)
    sources, at = {}, 0
    raw = torch.randint(
        0, 256, (4096,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed % 1000)
    )
    for number, shape in enumerate(shapes):
        count = torch.Size(shape).numel() * kind.itemsize
        part = raw[at : at + count] if shared else raw[at : at + count].clone()
        sources[f"t{number}"] = part.view(kind).view(shape)
        at += count
        if rng.random() < 0.5:
            at = -(-at // 8) * 8  # a gap
        at = -(-at // kind.itemsize) * kind.itemsize
    copies, wanted, parameters = [], {}, {}
    for name, tensor in sources.items():
        cut = rng.randrange(tensor.dim())
        size = tensor.shape[cut]
        first = rng.randrange(size + 1)
        pieces = [tensor.narrow(cut, 0, first), tensor.narrow(cut, first, size - first)]
        rng.shuffle(pieces)
        parameter = torch.zeros(sum(p.numel() for p in pieces) + 3, dtype=kind)
        place, offset = Place(name, "weight"), rng.choice([0, 1, 3])
        expected = parameter.clone()
        for piece in pieces:
            region = Region(offset, tuple(piece.shape), piece.contiguous().stride())
            read = Region(
                piece.storage_offset() - tensor.storage_offset(), tuple(piece.shape), piece.stride()
            )
            copies.append(Copy(name, read, place, region, kind.itemsize))
            expected[offset : offset + piece.numel()] = piece.reshape(-1)
            offset += piece.numel()
        parameters[place], wanted[place] = parameter, expected
    pairs = bind(fold(copies), sources, parameters)
    copy_all(pairs)
    assert differing(pairs) == set()
    for place, parameter in parameters.items():
        assert torch.equal(parameter.view(torch.uint8), wanted[place].view(torch.uint8))
