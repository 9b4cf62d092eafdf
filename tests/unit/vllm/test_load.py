"""Which way a version takes into a model, on small modules with loaders of every kind; vLLM's own code around them."""

import os
from importlib.util import find_spec

import pytest

if find_spec("vllm") is None and os.environ.get("CI") != "true":
    pytest.skip("vLLM is not installed: make setup", allow_module_level=True)

import torch
from torch import nn
from vllm.model_executor.model_loader.reload.layerwise import record_metadata_for_reloading

from weightsync_engine.vllm import load as loading
from weightsync_engine.vllm.load import Loader
from weightsync_engine.vllm.modules import make_plan
from weightsync_engine.vllm.trace import trace


class Leaf(nn.Module):
    """One weight of 4 x 2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 2), requires_grad=False)


class Model(nn.Module):
    """``how`` says what is done with a tensor for ``b``; ``a`` and ``c`` are copied."""

    def __init__(self, how="copy") -> None:
        super().__init__()
        self.a, self.b, self.c = Leaf(), Leaf(), Leaf()
        self.b.register_buffer("scale", torch.ones(2))
        self.how = how
        record_metadata_for_reloading(self)

    def load_weights(self, weights) -> None:
        for name, tensor in weights:
            module, _, own = name.partition(".")
            layer = getattr(self, module)
            loader = getattr(layer.weight, "weight_loader", None) or (lambda into, value: into.copy_(value))
            if module != "b" or self.how == "copy":
                loader(layer.weight, tensor)
            else:
                LOADERS[self.how](layer, own, tensor)


def _halves(layer, own, tensor):
    layer.weight.data[:2].copy_(tensor[:2])
    layer.weight.data[2:].copy_(tensor[2:])


def _padded(layer, own, tensor):
    layer.weight.data[:3].copy_(tensor[:3])
    layer.weight.data[3:].fill_(0)


def _part(layer, own, tensor):
    layer.weight.data[:3].copy_(tensor[:3])


def _twice(layer, own, tensor):
    layer.weight.data.copy_(tensor)
    layer.weight.data[:1].copy_(tensor[1:2])


def _after(layer, own, tensor):
    layer.weight.data.copy_(tensor)
    layer.weight.data.add_(1)


def _in_place(layer, own, tensor):
    tensor.mul_(2)
    layer.weight.data.copy_(tensor)


def _read_back(layer, own, tensor):
    layer.weight.data.copy_(tensor)
    layer.largest = layer.weight.data.amax()


def _rebound(layer, own, tensor):
    layer.weight.data = tensor


def _spread(layer, own, tensor):
    layer.weight.data.copy_(tensor[:1])


def _cast(layer, own, tensor):
    layer.weight.data.copy_(tensor.to(torch.float64).to(torch.float32))


def _stacked(layer, own, tensor):
    layer.weight.data.copy_(torch.cat([tensor[2:], tensor[:2]]))


def _buffer(layer, own, tensor):
    layer.weight.data.copy_(tensor)
    layer.scale.copy_(tensor[0])


LOADERS = {
    "halves": _halves,
    "padded": _padded,
    "part": _part,
    "twice": _twice,
    "after": _after,
    "in place": _in_place,
    "read back": _read_back,
    "rebound": _rebound,
    "spread": _spread,
    "cast": _cast,
    "stacked": _stacked,
    "buffer": _buffer,
}
ROWS = [(f"{name}.weight", torch.float32, (4, 2)) for name in "abc"]


def plan_of(model):
    return make_plan(model, trace(model, ROWS), [])


@pytest.mark.parametrize("how", ["copy", "halves", "padded"])
def test_plain_copies_and_constants_are_planned(how):
    plan = plan_of(Model(how))
    assert plan.planned == ("a", "b", "c")
    assert (plan.slow, plan.loaded) == ({}, frozenset())
    # Two halves side by side are one copy.
    assert len(plan.copies) == 3
    assert plan.names["b"] == {"b.weight"}


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("part", "in part only"),
        ("twice", "parts that overlap"),
        ("after", "add_.Tensor was done to it"),
        ("in place", "something computed of b.weight"),
        ("read back", "amax.default was computed of it"),
        ("rebound", "its memory was replaced"),
        ("spread", "b.weight was spread or cast into it"),
        ("cast", "something computed of b.weight"),
        ("stacked", "something computed of b.weight"),
        ("buffer", "scale is a buffer that is loaded"),
    ],
)
def test_everything_else_is_vllms(how, why):
    plan = plan_of(Model(how))
    assert plan.planned == ("a", "c")
    assert why in plan.slow["b"]
    assert plan.loaded == {"b.weight"}


def test_a_layout_that_differs_from_the_checkpoints_is_vllms():
    model = Model()
    model.b.weight.data = torch.zeros(2, 4).t()
    assert plan_of(model).slow == {"b": "weight is kept in another layout than checkpoints have"}


def test_attention_is_vllms():
    model = Model()
    plan = make_plan(model, trace(model, ROWS), [model.b])
    assert plan.slow == {"b": "attention"}


def test_a_tensor_that_nobody_looks_at_is_given_to_nobody():
    model = Model()
    load_weights = model.load_weights
    model.load_weights = lambda weights: load_weights(pair for pair in weights if pair[0] != "c.weight")
    plan = plan_of(model)
    assert plan.loaded == frozenset()
    assert plan.planned == ("a", "b")


# ------------------------------------------------------------------------------------------------ the loader


class Config:
    dtype = torch.float32

    class hf_config:  # noqa: N801
        tie_word_embeddings = False


class World:
    """A loader, and what it was seen to do."""

    def __init__(self, monkeypatch, how="copy", forbidden="") -> None:
        self.model = Model(how)
        self.loader = Loader(self.model, Config, torch.device("cpu"), forbidden)
        self.ways: list[tuple[str, ...]] = []
        self.asked: list[bool] = []
        self.others = True
        self.own_all, self.own_some = loading.load_all, loading.load_some
        monkeypatch.setattr(loading, "load_all", self.load_all)
        monkeypatch.setattr(loading, "load_some", self.load_some)
        monkeypatch.setattr(loading, "all_ranks", self.all_ranks)

    def load_all(self, model, config, tensors) -> None:
        self.ways.append(("all",))
        self.own_all(model, config, tensors)

    def load_some(self, model, config, layers, tensors) -> None:
        self.ways.append(tuple(name for name, _ in tensors))
        self.own_some(model, config, layers, tensors)

    def all_ranks(self, yes) -> bool:
        self.asked.append(yes)
        return yes and self.others

    def record(self, layout="one") -> None:
        self.loader.record(layout, trace(self.model, ROWS))

    def version(self, number):
        values = {name: torch.full((4, 2), float(number + i)) for i, (name, _, _) in enumerate(ROWS)}
        with torch.no_grad():
            loaded = self.loader.load(values.items())
        assert {name: parameter.data.tolist() for name, parameter in self.model.named_parameters()} == {
            name: value.tolist() for name, value in values.items()
        }
        return loaded


@pytest.fixture
def world(monkeypatch):
    return World(monkeypatch)


def test_the_first_version_is_vllms_the_others_are_planned_but_for_one_module(world):
    world.record()
    assert world.version(1).why_own == "the first version of a layout"
    second = world.version(2)
    assert (second.why_own, second.planned_modules, second.planned_bytes, second.copies) == ("", 3, 96, 3)
    assert second.own_modules == 1
    assert second.own_bytes == 32
    assert second is world.loader.last
    assert world.ways == [("all",), (f"{second.compared}.weight",)]


def test_in_the_long_run_every_module_is_compared(world):
    world.record()
    assert {world.version(number).compared for number in range(30)} == {"", "a", "b", "c"}


@pytest.mark.parametrize(("limit", "value"), [("MOST_TO_CHECK", 0), ("MOST_BYTES_TO_CHECK", 31)])
def test_a_module_of_many_tensors_or_bytes_is_not_compared_again(world, monkeypatch, limit, value):
    monkeypatch.setattr(loading, limit, value)
    world.record()
    world.version(1)
    assert world.version(2).compared == ""
    assert world.ways[-1] == ()


def test_without_a_manifest_and_where_it_is_forbidden_it_is_vllms(monkeypatch):
    world = World(monkeypatch)
    assert world.version(1).why_own == "no manifest was checked"
    world = World(monkeypatch, forbidden="LoRA wraps the model's layers")
    world.record()
    assert {world.version(number).why_own for number in (1, 2)} == {"LoRA wraps the model's layers"}


def test_a_new_layout_begins_anew(world):
    world.record()
    world.version(1)
    assert world.loader.knows("one")
    world.record("two")
    assert not world.loader.knows("one")
    assert world.version(2).why_own == "the first version of a layout"
    assert world.version(3).why_own == ""


def moved(model):
    model.b.weight.data = model.b.weight.data.clone()


def turned(model):
    model.b.weight.data = model.b.weight.data.view(2, 4)


def wrapped(model):
    model.wrapper = nn.ModuleDict({"base_layer": model.b})
    del model.b
    model.load_weights = lambda weights: [
        {"a": model.a, "b": model.wrapper["base_layer"], "c": model.c}[name[0]].weight.data.copy_(tensor)
        for name, tensor in weights
    ]


@pytest.mark.parametrize("change", [moved, turned, wrapped])
def test_a_model_that_is_not_where_it_was_drops_the_plan(world, change):
    world.record()
    world.version(1)
    world.version(2)
    change(world.model)
    assert not world.loader.knows("one")
    values = {name: torch.ones(4, 2) for name, _, _ in ROWS}
    before = len(world.ways)
    world.own_all = lambda model, config, tensors: None
    loaded = world.loader.load(values.items())
    assert loaded.why_own == "the model's memory is not what the plan was made for"
    assert world.ways[before:] == [("all",)]
    assert world.loader.plan is None


def test_a_module_that_vllm_keeps_in_another_form_is_vllms_from_then_on(world):
    own = world.own_all

    def halved(model, config, tensors):
        own(model, config, tensors)
        model.b.weight.data.copy_(model.b.weight.data.flip(0))

    world.own_all = halved
    world.record()
    values = {name: torch.arange(8.0).view(4, 2) for name, _, _ in ROWS}
    with torch.no_grad():
        world.loader.load(values.items())
    assert world.loader.plan.slow == {"b": "vLLM keeps it in another form than it is loaded in"}
    second = world.version(2)
    assert second.planned_modules == 2
    assert "b.weight" in world.ways[-1]


def test_a_plan_that_proves_wrong_is_dropped_and_the_version_loaded_again(world):
    world.record()
    world.version(1)
    own = world.own_some

    def other(model, config, layers, tensors):
        own(model, config, layers, tensors)
        for layer in layers:
            layer.weight.data.add_(1)

    world.own_some = other
    loaded = world.version(2)
    assert "differed from what vLLM loads" in loaded.why_own
    assert world.ways[-1] == ("all",)
    assert world.version(3).why_own == loaded.why_own


def test_all_ranks_take_the_same_way(world):
    world.record()
    world.version(1)
    world.others = False
    assert world.version(2).why_own == "another rank has no plan"
    world.others = True
    assert world.version(3).why_own == ""
    # One that agreed to the plan and then found it wrong takes all others along.
    answers = iter([True, False])
    world.all_ranks = lambda yes: yes and next(answers)
    loading.all_ranks = world.all_ranks
    assert world.version(4).why_own == "another rank's differed"


def test_a_rank_that_fails_tells_the_others_before_it_raises(world):
    world.record()
    world.version(1)
    before = len(world.asked)

    def fails(*_):
        raise OSError("broken")

    world.own_some = fails
    with pytest.raises(OSError, match="broken"):
        world.version(2)
    assert world.asked[before:] == [True, False]
