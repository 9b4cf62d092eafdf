"""Tests that need an NVIDIA GPU: ``make gpu``. Several ranks share one, so that one is enough."""

import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def gpu() -> None:
    """A machine without one is told so; NCCL lets ranks share a GPU from 2.30 on, when told to."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU is visible here")
    os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
