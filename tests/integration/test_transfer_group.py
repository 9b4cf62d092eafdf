"""The transfer engine over real gloo groups, each rank in a thread of its own."""

import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from weightsync_engine.transfer.communicator import RendezvousError, RendezvousTimeoutError, TransportError
from weightsync_engine.transfer.engine import InitInfo, ParallelLayout, UpdateInfo, WeightTransferEngine
from weightsync_engine.transfer.gloo import GlooCommunicator
from weightsync_engine.transfer.packing import as_bytes
from weightsync_engine.transfer.rendezvous import listen, reach

HOST = "127.0.0.1"
SECONDS = 20.0

TENSORS: dict[str, torch.Tensor] = {
    "embedding": torch.randn(64, 33),
    "norm": torch.randn(64).to(torch.bfloat16),
    "scalar": torch.tensor(3.5),
    "nothing": torch.empty(0, 7),
    "mask": torch.tensor([True, False, True]),
    "small": torch.randn(5).to(torch.float8_e4m3fn),
    "large": torch.randn(4000),
    "transposed": torch.randn(3, 5).t(),
    "last": torch.arange(9),
}


def update(packed: bool, size: int = 1 << 30, count: int = 2) -> UpdateInfo:
    names = list(TENSORS)
    dtypes = [str(TENSORS[name].dtype).removeprefix("torch.") for name in names]
    return UpdateInfo(names, dtypes, [list(TENSORS[name].shape) for name in names], packed, size, count)


def group(workers: int, use: Callable[[Any, list[WeightTransferEngine]], None]) -> None:
    """A trainer and its workers, each having joined; ``use`` gets the trainer's group and the engines."""
    rendezvous = listen(HOST, 0, workers + 1, "n", SECONDS)
    engines = [
        WeightTransferEngine(ParallelLayout(rank, workers), seconds=SECONDS) for rank in range(workers)
    ]
    info = InitInfo(HOST, rendezvous.port, 1, workers + 1, nonce="n", seconds=SECONDS)
    with ThreadPoolExecutor(workers + 1) as pool:
        joining = [pool.submit(engine.init_transfer_engine, info) for engine in engines]
        trainer = GlooCommunicator(rendezvous)
        for each in joining:
            each.result(SECONDS)
        try:
            use(trainer, engines)
        finally:
            for engine in engines:
                engine.shutdown()
            trainer.close()


def received(engine: WeightTransferEngine, info: UpdateInfo) -> tuple[dict[str, torch.Tensor], int]:
    out: dict[str, torch.Tensor] = {}
    calls = 0

    def load(pairs: list[tuple[str, torch.Tensor]]) -> None:
        nonlocal calls
        calls += 1
        # What is given is only lent.
        out.update((name, tensor.clone()) for name, tensor in pairs)

    engine.receive_weights(info, load)
    return out, calls


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(
    ("packed", "size", "count", "calls"),
    [
        pytest.param(False, 1, 1, len(TENSORS), id="one by one"),
        pytest.param(True, 1 << 30, 2, 1, id="all in one chunk"),
        pytest.param(True, 300, 2, None, id="tensors larger than the buffer"),
        pytest.param(True, 300, 1, None, id="a single buffer"),
        pytest.param(True, 1, 3, None, id="a chunk a tensor"),
    ],
)
def test_every_worker_gets_every_byte(
    workers: int, packed: bool, size: int, count: int, calls: int | None
) -> None:
    info = update(packed, size, count)

    def use(trainer: Any, engines: list[WeightTransferEngine]) -> None:
        with ThreadPoolExecutor(workers) as pool:
            waiting = [pool.submit(received, engine, info) for engine in engines]
            WeightTransferEngine.trainer_send_weights(
                iter(TENSORS.items()),
                trainer,
                packed=packed,
                packed_buffer_size_bytes=size,
                packed_num_buffers=count,
                seconds=SECONDS,
            )
            for each in waiting:
                got, made = each.result(SECONDS)
                assert list(got) == list(TENSORS)
                for name, tensor in TENSORS.items():
                    assert got[name].dtype is tensor.dtype
                    assert got[name].shape == tensor.shape
                    assert torch.equal(as_bytes(got[name]), as_bytes(tensor)), name
                assert calls is None or made == calls

    group(workers, use)


def test_what_is_sent_can_be_made_of_each_pair() -> None:
    info = UpdateInfo(["x"], ["float32"], [[4]])

    def use(trainer: Any, engines: list[WeightTransferEngine]) -> None:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(received, engines[0], info)
            WeightTransferEngine.trainer_send_weights(
                iter([("x", torch.ones(4))]),
                trainer,
                post_iter_func=lambda pair: pair[1] * 3,
                seconds=SECONDS,
            )
            assert torch.equal(waiting.result(SECONDS)[0]["x"], torch.full((4,), 3.0))

    group(1, use)


def test_the_trainer_takes_a_mapping_and_is_rank_0() -> None:
    port = listen(HOST, 0, 1, "x", SECONDS).port
    info = {
        "master_address": HOST,
        "master_port": port + 1,
        "world_size": 1,
        "nonce": "m",
        "seconds": SECONDS,
    }
    trainer = WeightTransferEngine.trainer_init(info)
    assert (trainer.rank, trainer.world_size) == (0, 1)
    trainer.close()


def test_no_global_group_is_made_and_an_existing_one_is_not_harmed(tmp_path: Any) -> None:
    assert not dist.is_initialized()
    group(1, lambda trainer, engines: None)
    assert not dist.is_initialized()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group(1, lambda trainer, engines: None)
        tensor = torch.ones(2)
        dist.all_reduce(tensor)
        assert torch.equal(tensor, torch.ones(2))
    finally:
        dist.destroy_process_group()


def test_a_sender_that_goes_is_told_to_the_receiver() -> None:
    def use(trainer: Any, engines: list[WeightTransferEngine]) -> None:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(received, engines[0], update(False))
            trainer.close()
            del trainer
            with pytest.raises(TransportError):
                waiting.result(SECONDS)

    rendezvous = listen(HOST, 0, 2, "n", SECONDS)
    engine = WeightTransferEngine(ParallelLayout(), seconds=2.0)
    info = InitInfo(HOST, rendezvous.port, 1, 2, nonce="n", seconds=SECONDS)
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(engine.init_transfer_engine, info)
        trainer = GlooCommunicator(rendezvous)
        joining.result(SECONDS)
    use(trainer, [engine])


def test_a_receiver_does_not_wait_longer_than_it_may() -> None:
    def use(trainer: Any, engines: list[WeightTransferEngine]) -> None:
        engines[0]._seconds = 0.3
        with pytest.raises(TransportError):
            received(engines[0], update(False))

    group(1, use)


def test_a_stale_rank_0_of_another_epoch_is_no_peer() -> None:
    rendezvous = listen(HOST, 0, 2, "old", SECONDS)
    with pytest.raises(RendezvousError, match="another epoch"):
        GlooCommunicator(reach(HOST, rendezvous.port, 1, 2, "new", 5.0))


def test_a_wrong_world_size_is_told_by_both_numbers() -> None:
    rendezvous = listen(HOST, 0, 3, "n", SECONDS)
    with pytest.raises(RendezvousError, match="expects 3 ranks, this one 2"):
        GlooCommunicator(reach(HOST, rendezvous.port, 1, 2, "n", 5.0))


def test_a_port_in_use_is_told_with_what_to_do() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RendezvousError, match=r"transport\.port to 0"):
            listen(HOST, port, 2, "n", 2.0)


def test_rank_0_listens_on_its_own_address_only() -> None:
    rendezvous = listen(HOST, 0, 2, "n", SECONDS)
    socket.create_connection((HOST, rendezvous.port), 5.0).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", rendezvous.port), 5.0)


def test_a_rank_outside_of_the_group_is_refused() -> None:
    with pytest.raises(RendezvousError, match="rank 2 is none of a group of 2"):
        GlooCommunicator(reach(HOST, 1, 2, 2, "n", 1.0))


def test_a_group_that_nobody_completes_ends_in_time() -> None:
    rendezvous = listen(HOST, 0, 2, "n", 1.0)
    done = threading.Event()
    errors: list[BaseException] = []

    def join() -> None:
        try:
            GlooCommunicator(rendezvous)
        except RendezvousError as error:
            errors.append(error)
        done.set()

    threading.Thread(target=join, daemon=True).start()
    assert done.wait(15)
    assert errors


def test_a_rank_that_comes_before_rank_0_has_said_for_what_it_listens_waits_for_that() -> None:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    store = TCPStore(HOST, port, None, True, timedelta(seconds=SECONDS), wait_for_workers=False)
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(reach, HOST, port, 1, 2, "n", SECONDS)
        with pytest.raises(TimeoutError):
            joining.result(0.5)
        store.set("weightsync/group", json.dumps({"nonce": "another", "world_size": 2}))
        with pytest.raises(RendezvousError, match="another epoch"):
            joining.result(SECONDS)


def test_ranks_with_another_version_of_the_library_are_told_before_anything_is_connected() -> None:
    rendezvous = listen(HOST, 0, 2, "n", SECONDS, "NCCL 2.29.7")
    with pytest.raises(RendezvousError, match=r"has NCCL 2\.29\.7, this rank NCCL 2\.32\.3: .* same image"):
        reach(HOST, rendezvous.port, 1, 2, "n", 5.0, "NCCL 2.32.3")
    with pytest.raises(RendezvousError, match=r"has NCCL 2\.29\.7, this rank another one"):
        reach(HOST, rendezvous.port, 1, 2, "n", 5.0)


def test_what_rank_0_tells_is_heard_and_what_it_does_not_tell_is_waited_for_in_vain() -> None:
    rendezvous = listen(HOST, 0, 2, "n", SECONDS)
    other = reach(HOST, rendezvous.port, 1, 2, "n", 0.5)
    rendezvous.tell("id", bytes(range(256)))
    assert other.hear("id") == bytes(range(256))
    with pytest.raises(RendezvousTimeoutError, match="rank 0 never told another"):
        other.hear("another")


def test_those_who_do_not_come_are_named_before_a_library_waits_for_them() -> None:
    rendezvous = listen(HOST, 0, 3, "n", 0.5)
    rendezvous.enter()
    reach(HOST, rendezvous.port, 2, 3, "n", 5.0).enter()
    with pytest.raises(RendezvousTimeoutError, match="in time: 1 never came"):
        rendezvous.gather()
