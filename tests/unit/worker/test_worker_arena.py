"""A rank's own memory for versions, asked for over its socket. A tensor on the CPU stands for the one on a GPU."""

import os

import pytest
import torch
from staged_images import flat_image, manifest_of, memory

from weightsync_contract.messages import VersionId
from weightsync_engine.reference.model_files import TINY, random_weights
from weightsync_engine.transfer.cuda.place import Place
from weightsync_engine.worker.client import WorkerClient, WorkerRefusedError
from weightsync_engine.worker.protocol import Hello, Image
from weightsync_engine.worker.server import WorkerServer
from weightsync_engine.worker.state import WorkerState
from weightsync_engine.worker.tensors import views

WEIGHTS = random_weights(TINY, 3)
MANIFEST = manifest_of(WEIGHTS)
IMAGE = Image(VersionId("run-a", 4), MANIFEST.layout, "xxh3-128-tree:0")


class HostArena:
    """What ``worker.arena.Arena`` is on a GPU."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.memory = torch.zeros(nbytes, dtype=torch.uint8)
        self.fd = Place("00" * 64, nbytes, "GPU-0").write()

    def is_place(self, fd: int) -> bool:
        return os.path.sameopenfile(self.fd, fd)

    def image(self, nbytes: int) -> torch.Tensor:
        return self.memory[:nbytes]


@pytest.fixture
def arena():
    arena = HostArena(MANIFEST.nbytes + 256)
    yield arena
    os.close(arena.fd)


@pytest.fixture
def state(arena):
    state = WorkerState(Hello("boot-1", 0, 1, "test 1", os.getpid()), arena)
    state.keep_manifest(MANIFEST.layout, MANIFEST.encode().decode())
    return state


@pytest.fixture
def client(tmp_path, state):
    server = WorkerServer(tmp_path, "0", state)
    server.start()
    yield WorkerClient(server.path, 5.0)
    server.close()


def test_what_was_received_into_it_is_what_is_applied(client, state, arena):
    fd = client.arena(MANIFEST.nbytes)
    try:
        arena.memory[: MANIFEST.nbytes] = torch.frombuffer(bytearray(flat_image(WEIGHTS)), dtype=torch.uint8)
        client.attach(IMAGE, MANIFEST.nbytes, fd)
    finally:
        os.close(fd)
    state.checked(MANIFEST.layout, ())
    given = dict(views(state.begin(IMAGE)))
    assert given.keys() == WEIGHTS.keys()
    assert all(torch.equal(given[name], WEIGHTS[name]) for name in WEIGHTS)
    assert all(each.untyped_storage().data_ptr() == arena.memory.data_ptr() for each in given.values())


def test_it_is_not_given_away_while_an_image_lies_in_it(client, state, arena):
    fd = client.arena(MANIFEST.nbytes)
    client.attach(IMAGE, MANIFEST.nbytes, fd)
    os.close(fd)
    with pytest.raises(WorkerRefusedError, match=r"run-a/4 .* is attached"):
        client.arena(MANIFEST.nbytes)
    client.drop()
    os.close(client.arena(MANIFEST.nbytes))


def test_memory_of_the_host_is_taken_by_an_engine_with_an_arena_too(client, state):
    fd = memory(flat_image(WEIGHTS))
    try:
        client.attach(IMAGE, MANIFEST.nbytes, fd)
    finally:
        os.close(fd)
    assert state.status().attached == IMAGE


def test_the_place_of_another_engines_arena_is_refused(client):
    other = HostArena(MANIFEST.nbytes)
    with pytest.raises(WorkerRefusedError, match="the memory has"):
        client.attach(IMAGE, MANIFEST.nbytes, other.fd)
    os.close(other.fd)


@pytest.mark.parametrize(("more", "message"), [(257, "or more"), (0, None)])
def test_a_version_that_does_not_fit_is_refused_with_what_to_do(client, more, message):
    if message is None:
        os.close(client.arena(MANIFEST.nbytes + more))
        return
    with pytest.raises(WorkerRefusedError, match=rf"WEIGHTSYNC_ARENA={MANIFEST.nbytes + more} {message}"):
        client.arena(MANIFEST.nbytes + more)


def test_an_engine_that_keeps_none_says_how_to_have_one(tmp_path):
    server = WorkerServer(tmp_path, "0", WorkerState(Hello("boot-1", 0, 1, "test 1", os.getpid())))
    server.start()
    with pytest.raises(WorkerRefusedError, match="WEIGHTSYNC_ARENA=auto"):
        WorkerClient(server.path, 5.0).arena(1)
    server.close()
