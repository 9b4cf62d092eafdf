"""All ranks of an engine answer one question together, on the host and apart from the model's own traffic."""

from collections.abc import Sequence

import torch
from torch.distributed import ReduceOp, all_reduce
from vllm.distributed.parallel_state import get_world_group


def all_ranks(yes: bool) -> bool:
    """True on every rank if it is on each. Every rank must call it, as many times as the others."""
    return bool(smallest([int(yes)])[0])


def smallest(numbers: Sequence[int]) -> list[int]:
    """Each number's minimum over all ranks."""
    return _reduce(numbers, ReduceOp.MIN)


def largest(numbers: Sequence[int]) -> list[int]:
    """Each number's maximum over all ranks."""
    return _reduce(numbers, ReduceOp.MAX)


def total(numbers: Sequence[int]) -> list[int]:
    """Each number's sum over all ranks."""
    return _reduce(numbers, ReduceOp.SUM)


def _reduce(numbers: Sequence[int], how: "ReduceOp.RedOpType") -> list[int]:
    world = get_world_group()
    if world.world_size == 1 or not numbers:
        return list(numbers)
    tensor = torch.tensor(numbers, dtype=torch.int64)
    all_reduce(tensor, op=how, group=world.cpu_group)
    return [int(number) for number in tensor.tolist()]
