"""A rank's part in an update: nothing is raised, everything is told."""

import os

import pytest
import torch
from staged_images import flat_image, manifest_of, memory

from weightsync_contract.messages import VersionId
from weightsync_engine.reference.model_files import TINY, random_weights
from weightsync_engine.worker.protocol import Hello, Image, Problem
from weightsync_engine.worker.session import UpdateSession, image_of
from weightsync_engine.worker.state import WorkerState

WEIGHTS = {**random_weights(TINY, 3), "empty": torch.empty(0, 3), "scalar": torch.tensor(2.5)}
MANIFEST = manifest_of(WEIGHTS)
IMAGE = Image(VersionId("run-a", 4), MANIFEST.layout, "xxh3-128:0")


class Model:
    def __init__(self) -> None:
        self.loaded: dict[str, torch.Tensor] = {}
        self.problems: tuple[Problem, ...] = ()
        self.error: Exception | None = None

    def check(self, manifest):
        if self.error:
            raise self.error
        return self.problems

    def load(self, tensors) -> None:
        for name, tensor in tensors:
            self.loaded[name] = tensor.clone()
            if self.error:
                raise self.error


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def state():
    return WorkerState(Hello("boot", 0, 1, "test", 1))


@pytest.fixture
def session(state, model):
    session = UpdateSession(state, model.check, model.load)
    state.keep_manifest(MANIFEST.layout, MANIFEST.encode().decode())
    session.preflight(MANIFEST.layout)
    fd = memory(flat_image(WEIGHTS))
    state.attach(IMAGE, MANIFEST.nbytes, fd)
    os.close(fd)
    return session


def test_every_tensor_arrives_as_it_was_published(session, state, model):
    session.start()
    session.receive(IMAGE)
    assert session.begin()
    session.complete(True)
    assert list(model.loaded) == list(WEIGHTS)
    for name, tensor in WEIGHTS.items():
        assert torch.equal(model.loaded[name], tensor), name
        assert model.loaded[name].shape == tensor.shape
    status = state.status()
    assert (status.applied, status.clean, status.error, status.attached) == (IMAGE, True, "", None)


def test_what_others_refuse_is_not_touched(session, state, model):
    session.start()
    session.receive(IMAGE)
    assert session.begin()
    session.complete(False)
    status = state.status()
    assert (model.loaded, status.applied, status.clean) == ({}, None, True)
    assert status.error == "another rank refused the update"


def test_a_finish_without_an_update_applies_nothing_and_keeps_the_image(session, state, model):
    session.start()
    assert not session.begin()
    session.complete(False)
    assert (model.loaded, state.status().error) == ({}, "finished without an update")
    assert state.status().attached == IMAGE


def test_start_forgets_what_was_asked_before(session):
    session.receive(IMAGE)
    session.start()
    assert not session.begin()


def test_a_failure_in_the_middle_is_told_as_unclean(session, state, model):
    session.start()
    session.receive(IMAGE)
    session.begin()
    model.error = RuntimeError("the device is gone")
    session.complete(True)
    status = state.status()
    assert (status.clean, status.applied) == (False, None)
    assert "the device is gone" in status.error


def test_preflight_tells_problems_its_own_failure_and_a_missing_manifest(session, state, model):
    model.problems = (Problem("a", "b", "c"),)
    session.preflight(MANIFEST.layout)
    assert state.status().preflight.problems == model.problems
    model.error = RuntimeError("no such layer")
    session.preflight(MANIFEST.layout)
    assert "no such layer" in state.status().preflight.problems[0].what
    session.preflight("sha256:another")
    assert "sha256:another is not here" in str(state.status().preflight.problems[0])


def test_an_image_is_named_in_full():
    info = {"run": "run-a", "version": 4, "layout": MANIFEST.layout, "digest": "xxh3-128:0"}
    assert image_of(info) == IMAGE
    for name in info:
        with pytest.raises(ValueError, match="run, version, layout and digest"):
            image_of({k: v for k, v in info.items() if k != name})
