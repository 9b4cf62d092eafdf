"""The backend as a worker of vLLM makes and calls it, on a small model."""

import os
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

if find_spec("vllm") is None and os.environ.get("CI") != "true":
    pytest.skip("vLLM is not installed: make setup", allow_module_level=True)

import torch
from torch import nn
from vllm.model_executor.model_loader.reload.layerwise import record_metadata_for_reloading

from weightsync_contract.manifest import Manifest, TensorSpec
from weightsync_engine.vllm import backend as made
from weightsync_engine.vllm.backend import WeightSyncBackend

MANIFEST = Manifest((TensorSpec("inner.weight", "float32", (4, 2)),))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(torch.zeros(4, 2), requires_grad=False)
        record_metadata_for_reloading(self)

    def load_weights(self, weights) -> None:
        for name, tensor in weights:
            parameter = dict(self.named_parameters())[name]
            loader = getattr(parameter, "weight_loader", None) or (lambda into, value: into.copy_(value))
            loader(parameter, tensor)


def config(path="", **more):
    parallel = SimpleNamespace(data_parallel_size=1, rank=0, world_size=1, enable_eplb=False)
    model = SimpleNamespace(
        model=str(path), hf_config=SimpleNamespace(tie_word_embeddings=False), dtype=torch.float32
    )
    found = SimpleNamespace(parallel_config=parallel, model_config=model, lora_config=None)
    for name, value in more.items():
        setattr(parallel if hasattr(parallel, name) else found, name, value)
    return found


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setenv("WEIGHTSYNC_DIR", str(tmp_path))
    monkeypatch.setattr(
        "weightsync_engine.vllm.agreement.get_world_group", lambda: SimpleNamespace(world_size=1)
    )
    engines = []

    def make(**more):
        engines.append(WeightSyncBackend(None, config(tmp_path, **more), torch.device("cpu"), Model()))
        return engines[-1]

    yield make
    for engine in engines:
        engine._server.close()


def test_more_than_one_data_parallel_rank_is_refused_with_what_to_do(make):
    with pytest.raises(ValueError, match=r"one data parallel rank an engine.*start an engine \(a pod\) each"):
        make(data_parallel_size=2)


def load(engine, value):
    with torch.no_grad():
        engine._load([("inner.weight", torch.full((4, 2), float(value)))])
    assert engine.model.inner.weight.data.tolist() == [[value, value]] * 4
    return engine.loaded


def test_what_it_loaded_and_how_can_be_read(make):
    engine = make()
    assert engine.loaded is None
    assert engine._check(MANIFEST) == ()
    assert load(engine, 1).why_own == "the first version of a layout"
    second = load(engine, 2)
    assert (second.planned_modules, second.planned_bytes, second.why_own) == (1, 32, "")
    assert str(second).startswith(
        "32 bytes of 1 modules in 1 copies, 32 bytes of 1 modules loaded by vLLM in "
    )


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"lora_config": object()}, "LoRA wraps the model's layers"),
        ({"enable_eplb": True}, "experts move between ranks (enable_eplb)"),
    ],
)
def test_where_places_may_change_there_is_no_plan(make, more, why):
    engine = make(**more)
    assert engine._check(MANIFEST) == ()
    assert {load(engine, value).why_own for value in (1, 2)} == {why}


def test_a_manifest_that_is_known_is_not_traced_again_until_the_model_moves(make, monkeypatch):
    engine = make()
    traced = []
    check = made.check
    monkeypatch.setattr(made, "check", lambda *given: traced.append(1) or check(*given))
    for _ in range(3):
        assert engine._check(MANIFEST) == ()
    assert len(traced) == 1
    load(engine, 1)
    engine._check(MANIFEST)
    assert len(traced) == 1
    engine.model.inner.weight.data = engine.model.inner.weight.data.clone()
    engine._check(MANIFEST)
    assert len(traced) == 2
    assert load(engine, 3).why_own == "the first version of a layout"


def test_a_manifest_that_is_refused_leaves_no_plan(make):
    engine = make()
    assert engine._check(MANIFEST) == ()
    load(engine, 1)
    (problem,) = engine._check(Manifest((TensorSpec("inner.weight", "float16", (4, 2)),)))
    assert "has dtype float16" in problem.what
    assert not engine._loader.knows(MANIFEST.layout)
    assert engine._check(MANIFEST) == ()
    assert load(engine, 2).why_own == "the first version of a layout"
