"""Replaying copies between tensors that are there."""

import os

import pytest

if os.environ.get("CI") != "true":
    pytest.importorskip("torch", reason="torch is not installed: make setup")

import torch

from weightsync_engine.vllm import replay
from weightsync_engine.vllm.plan import Copy, Place, Region
from weightsync_engine.vllm.replay import bind, copy_all, differing

GATE, UP = Place("mlp", "gate_up"), Place("norm", "weight")


def whole(source: str, place: Place, at: int, count: int) -> Copy:
    return Copy(source, Region(0, (count,), (1,)), place, Region(at, (count,), (1,)), 4)


def test_tensors_that_share_a_memory_and_adjoin_are_one_copy():
    image = torch.arange(8.0)
    copies = [whole("gate", GATE, 0, 4), whole("up", GATE, 4, 4)]
    parameters = {GATE: torch.zeros(8)}
    pairs = bind(copies, {"gate": image[:4], "up": image[4:]}, parameters)
    assert len(pairs) == 1
    copy_all(pairs)
    assert parameters[GATE].tolist() == list(range(8))
    apart = bind(copies, {"gate": image[:4].clone(), "up": image[4:].clone()}, {GATE: torch.zeros(8)})
    assert len(apart) == 2
    turned = bind(copies, {"gate": image[4:], "up": image[:4]}, {GATE: torch.zeros(8)})
    assert len(turned) == 2


def test_a_parameter_that_is_a_part_of_a_memory_is_written_where_it_is():
    memory = torch.zeros(6)
    copy_all(bind([whole("a", UP, 0, 2)], {"a": torch.ones(2)}, {UP: memory[3:5]}))
    assert memory.tolist() == [0, 0, 0, 1, 1, 0]


def test_every_bit_counts():
    parameters = {GATE: torch.zeros(4), UP: torch.full((2,), float("nan"))}
    values = {"a": torch.tensor([0.0, -0.0, 0.0, 0.0]), "b": torch.full((2,), float("nan"))}
    pairs = bind([whole("a", GATE, 0, 4), whole("b", UP, 0, 2)], values, parameters)
    # A minus zero is another bit, a NaN the same ones.
    assert differing(pairs) == {"mlp"}
    copy_all(pairs)
    assert differing(pairs) == set()


def test_the_last_of_many_pieces_is_compared_too(monkeypatch):
    monkeypatch.setattr(replay, "COMPARED_WORDS", 3)
    parameters = {GATE: torch.zeros(8)}
    values = {"a": torch.zeros(8)}
    pairs = bind([whole("a", GATE, 0, 8)], values, parameters)
    assert differing(pairs) == set()
    values["a"][7] = 1
    assert differing(pairs) == {"mlp"}


def test_copies_of_rows_and_columns_go_beside_those_of_runs():
    source = torch.arange(12.0).view(3, 4)
    half = Copy("a", Region(2, (3, 2), (4, 1)), GATE, Region(0, (3, 2), (2, 1)), 4)
    parameters = {GATE: torch.zeros(3, 2), UP: torch.zeros(2)}
    copy_all(bind([half, whole("b", UP, 0, 2)], {"a": source, "b": torch.ones(2)}, parameters))
    assert parameters[GATE].tolist() == [[2, 3], [6, 7], [10, 11]]
    assert parameters[UP].tolist() == [1, 1]


def test_another_tensor_than_the_plan_was_made_for_is_refused():
    with pytest.raises(ValueError, match="a is not the contiguous tensor"):
        bind([whole("a", UP, 0, 2)], {"a": torch.ones(4)[::2]}, {UP: torch.zeros(2)})
    with pytest.raises(ValueError, match="a is not the contiguous tensor"):
        bind([whole("a", UP, 0, 2)], {"a": torch.ones(2, dtype=torch.float16)}, {UP: torch.zeros(2)})
    with pytest.raises(KeyError):
        bind([whole("a", UP, 0, 2)], {}, {UP: torch.zeros(2)})
