"""How tensors and images are cut, and that both ends cut alike."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightsync_contract.manifest import Manifest
from weightsync_engine.transfer.backends import library
from weightsync_engine.transfer.engine import InitInfo, ParallelLayout, UpdateInfo, WeightTransferEngine
from weightsync_engine.transfer.flat import (
    FIRST_PIECE_BYTES,
    PIECE_BYTES,
    Limit,
    piece_bytes,
    spans,
    tensor_spans,
)
from weightsync_engine.transfer.packing import Described, as_bytes, chunks, from_bytes


@given(st.lists(st.integers(0, 300)), st.integers(1, 500))
def test_chunks_hold_everything_once_and_close_when_they_pass_the_limit(sizes: list[int], limit: int) -> None:
    cut = list(chunks(sizes, limit))
    assert [index for chunk in cut for index in chunk] == list(range(len(sizes)))
    for number, chunk in enumerate(cut):
        total = sum(sizes[index] for index in chunk)
        assert total - sizes[chunk[-1]] <= limit
        assert total > limit or number == len(cut) - 1


@given(st.integers(0, 5000), st.integers(1, 700))
def test_spans_cover_the_image_without_gap_or_overlap(nbytes: int, longest: int) -> None:
    at = 0
    for start, end in spans(nbytes, longest):
        assert start == at
        assert 0 < end - start <= longest
        at = end
    assert at == nbytes


@pytest.mark.parametrize(
    ("buffer_bytes", "rate", "longest"),
    [
        (256 << 20, 0, FIRST_PIECE_BYTES),
        (1000, 0, 1000),
        (256 << 20, 5 << 20, 1 << 19),
        (256 << 20, 300e6, 30_000_000),
        (256 << 20, 20e9, PIECE_BYTES),
        (256 << 20, 1000, 64 << 10),
        (1000, 1, 1000),
    ],
)
def test_pieces_are_short_enough_to_show_progress(buffer_bytes: int, rate: float, longest: int) -> None:
    assert piece_bytes(buffer_bytes, rate) == longest


def test_tensor_spans_cover_the_padding_too() -> None:
    manifest = Manifest.from_lists(["a", "none", "b"], ["uint8", "float32", "float32"], [[3], [0], [100]])
    assert list(tensor_spans(manifest)) == [(0, 256), (256, 768)]
    assert manifest.nbytes == 768


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64]
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 0, 4)])
def test_bytes_and_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    back = from_bytes(as_bytes(tensor), Described("x", dtype, shape))
    assert back.dtype is dtype
    assert back.shape == tensor.shape
    assert torch.equal(as_bytes(back), as_bytes(tensor))


def test_a_tensor_that_lies_at_an_odd_place_is_read_right() -> None:
    data = torch.cat([torch.zeros(3, dtype=torch.uint8), as_bytes(torch.arange(4.0))])
    assert torch.equal(from_bytes(data[3:], Described("x", torch.float32, (4,))), torch.arange(4.0))


def test_a_transposed_tensor_is_sent_in_the_order_of_its_elements() -> None:
    tensor = torch.arange(6.0).reshape(2, 3).t()
    assert torch.equal(from_bytes(as_bytes(tensor), Described("x", torch.float32, (3, 2))), tensor)


@pytest.mark.parametrize(
    ("names", "dtypes", "shapes", "message"),
    [
        (["a", "b"], ["float32"], [[1], [1]], "dtype_names has 1 entries but names has 2"),
        (["a", "b"], ["float32", "float32"], [[1]], "shapes has 1 entries but names has 2"),
        (["a"], ["float99"], [[1]], "'float99', which torch does not have"),
        (["a"], ["zeros"], [[1]], "'zeros', which torch does not have"),
    ],
)
def test_an_update_that_contradicts_itself_is_refused(
    names: list[str], dtypes: list[str], shapes: list[list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        UpdateInfo(names, dtypes, shapes)


@pytest.mark.parametrize(("size", "count"), [(0, 2), (1, 0)])
def test_buffers_of_nothing_are_refused(size: int, count: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        UpdateInfo(["a"], ["float32"], [[1]], True, size, count)


def test_ranks_are_unique_and_contiguous_over_replicas_and_workers() -> None:
    ranks = [ParallelLayout(rank, 4, replica).group_rank(1) for replica in range(3) for rank in range(4)]
    assert ranks == list(range(1, 13))


def test_receiving_before_init_is_an_error_that_says_so() -> None:
    with pytest.raises(RuntimeError, match="init_transfer_engine first"):
        WeightTransferEngine(ParallelLayout()).receive_weights(UpdateInfo([], [], []), lambda pairs: None)


def test_shutdown_twice_is_no_error() -> None:
    engine = WeightTransferEngine(ParallelLayout())
    engine.shutdown()
    engine.shutdown()
    assert engine.group is None


def test_a_backend_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    info = InitInfo("127.0.0.1", 0, 1, 2, backend="MPI")
    with pytest.raises(ValueError, match="backend 'MPI': there are Gloo and NCCL"):
        WeightTransferEngine(ParallelLayout()).init_transfer_engine(info)


def test_a_limit_holds_back_and_no_limit_does_not() -> None:
    began = time.monotonic()
    Limit(0).after(1 << 40)
    assert time.monotonic() - began < 1
    began = time.monotonic()
    Limit(1000).after(200)
    assert time.monotonic() - began >= 0.19


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_where_nccl_can_not_be_used_it_is_said_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"backend NCCL.* (nccl4py|sees no GPU|libnccl)"):
        library("NCCL")
