"""The interface of vLLM's nccl engine over our NCCL group: two processes, tensors on the GPU."""

import multiprocessing
from multiprocessing.connection import Connection

import pytest
import torch

from weightsync_engine.transfer.engine import InitInfo, ParallelLayout, UpdateInfo, WeightTransferEngine

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]

SHAPES = {"a": (1000, 333), "b": (7,), "empty": (0, 4), "c": (2048, 1024), "d": (3, 5, 7)}
DTYPES = {
    "a": torch.bfloat16,
    "b": torch.float32,
    "empty": torch.float32,
    "c": torch.bfloat16,
    "d": torch.int8,
}


def weights(seed: int) -> dict[str, torch.Tensor]:
    """The same on both sides."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(-100, 100, shape, generator=generator).to(DTYPES[name]).cuda()
        for name, shape in SHAPES.items()
    }


def receive(connection: Connection) -> None:
    """A worker: says for each update whether all tensors are those that were sent."""
    torch.cuda.set_device(0)
    engine = WeightTransferEngine(ParallelLayout(), seconds=60)
    engine.init_transfer_engine(InitInfo(**connection.recv()))
    got: dict[str, torch.Tensor] = {}

    def load(some: list[tuple[str, torch.Tensor]]) -> None:
        # What is given is only valid until this returns.
        got.update({name: each.clone() for name, each in some})

    while (order := connection.recv()) is not None:
        seed, update = order
        got.clear()
        info = UpdateInfo(
            list(SHAPES),
            [str(dtype).removeprefix("torch.") for dtype in DTYPES.values()],
            [list(shape) for shape in SHAPES.values()],
            **update,
        )
        engine.receive_weights(info, load)
        torch.cuda.synchronize()
        connection.send(all(torch.equal(got[name], each) for name, each in weights(seed).items()))
    engine.shutdown()


@pytest.mark.parametrize(
    "update",
    [
        {},
        {"packed": True},
        {"packed": True, "packed_buffer_size_bytes": 1 << 20, "packed_num_buffers": 3},
    ],
    ids=["one by one", "packed", "packed in small buffers"],
)
def test_what_is_sent_is_loaded(update: dict[str, object], unused_tcp_port: int) -> None:
    place = {"master_address": "127.0.0.1", "master_port": unused_tcp_port, "world_size": 2}
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=receive, args=(theirs,), daemon=True)
    process.start()
    more = {"backend": "NCCL", "nonce": "n", "seconds": 60.0}
    ours.send({**place, **more, "rank_offset": 1})
    group = WeightTransferEngine.trainer_init({**place, **more})
    try:
        for seed in (1, 2):
            ours.send((seed, update))
            pairs = iter(weights(seed).items())
            WeightTransferEngine.trainer_send_weights(pairs, group, seconds=60, **update)  # type: ignore[arg-type]
            assert ours.poll(60)
            assert ours.recv() is True
        ours.send(None)
    finally:
        group.close()
        process.join(20)
        process.kill()
