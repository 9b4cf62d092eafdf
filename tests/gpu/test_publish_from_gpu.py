"""A trainer whose tensors are on a GPU: what the agent keeps is what they hold."""

import asyncio
import time

import pytest
import torch

from weightsync_contract.manifest import Manifest, aligned
from weightsync_engine.client import publish
from weightsync_engine.digest import digest_image
from weightsync_engine.publish.device import PIECE_BYTES
from weightsync_engine.publish.server import PublishServer
from weightsync_engine.publish.store import VersionStore

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

TENSORS = {
    "long": torch.randint(-9, 9, (5 * PIECE_BYTES // 8 + 3,), dtype=torch.int16),
    "as long as a piece": torch.rand(PIECE_BYTES // 4),
    "turned": torch.rand(300, 200).T,
    "one": torch.tensor(3.5),
    "none": torch.zeros(0, 4),
    "short": torch.rand(7).to(torch.bfloat16),
    "yes or no": torch.tensor([True, False, True]),
}


def image_of(tensors: dict[str, torch.Tensor]) -> tuple[Manifest, bytes]:
    manifest = Manifest.from_lists(
        list(tensors),
        [str(each.dtype).removeprefix("torch.") for each in tensors.values()],
        [list(each.shape) for each in tensors.values()],
    )
    parts = [each.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for each in tensors.values()]
    return manifest, b"".join(part.ljust(aligned(len(part)), b"\0") for part in parts)


@pytest.fixture
async def server(tmp_path):
    server = PublishServer(tmp_path / "publish.sock", VersionStore(tmp_path / "versions"))
    await server.start()
    yield tmp_path / "publish.sock"
    await server.close()


async def test_the_agent_keeps_what_the_gpu_holds(server):
    manifest, image = image_of(TENSORS)
    on_gpu = {name: each.cuda() for name, each in TENSORS.items() if name != "turned"}
    on_gpu = {
        name: (TENSORS["turned"].T.contiguous().cuda().T if name == "turned" else on_gpu[name])
        for name in TENSORS
    }
    assert not on_gpu["turned"].is_contiguous()
    result = await asyncio.to_thread(publish, on_gpu, 1, run="run", socket=str(server))
    assert result.digest == digest_image(manifest.layout, image)


async def test_what_a_stream_has_not_done_yet_is_waited_for(server):
    tensor = torch.zeros(PIECE_BYTES, device="cuda")
    # Long work in front of the value that is to be published.
    slow = torch.rand(4096, 4096, device="cuda")
    for _ in range(50):
        slow = slow @ slow / slow.norm()
    tensor += slow.isfinite().all() * 2 + 1
    result = await asyncio.to_thread(publish, {"a": tensor}, 1, run="run", socket=str(server))
    value = float(tensor[0])
    manifest, image = image_of({"a": torch.full((PIECE_BYTES,), value)})
    assert result.digest == digest_image(manifest.layout, image)


async def test_how_fast_it_is(server):
    tensors = {str(number): torch.rand(64 << 20, device="cuda") for number in range(8)}
    for version in (1, 2):
        began = time.perf_counter()
        await asyncio.to_thread(publish, tensors, version, run="run", socket=str(server))
        seconds = time.perf_counter() - began
        print(f"{8 * 256 / 1024:.0f} GiB in {seconds:.2f} s")
    assert seconds < 20
