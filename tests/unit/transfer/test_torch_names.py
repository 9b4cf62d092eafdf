"""The names of torch that the transfer uses and torch does not promise: a new pin has to have them all."""

import inspect

import pytest
import torch.distributed as dist
from torch.distributed import ProcessGroupGloo, TCPStore


def test_gloo_takes_options_and_devices_of_ours() -> None:
    options = ProcessGroupGloo._Options()
    for name in ("_timeout", "_devices", "_threads"):
        assert hasattr(options, name)
    assert "hostname" in (ProcessGroupGloo.create_device.__doc__ or "")


@pytest.mark.parametrize("name", ["broadcast", "shutdown"])
def test_a_group_broadcasts_and_is_left(name: str) -> None:
    assert callable(getattr(ProcessGroupGloo, name))


@pytest.mark.parametrize("name", ["rootRank", "rootTensor", "timeout"])
def test_a_broadcast_has_a_root_and_a_time_of_its_own(name: str) -> None:
    assert hasattr(dist.BroadcastOptions(), name)


@pytest.mark.parametrize("name", ["wait", "is_completed"])
def test_a_broadcast_under_way_can_be_waited_for(name: str) -> None:
    assert callable(getattr(dist.Work, name))


@pytest.mark.parametrize("name", ["add", "check", "get", "set", "wait", "port"])
def test_the_store_holds_counters_and_strings(name: str) -> None:
    assert hasattr(TCPStore, name)


@pytest.mark.parametrize("name", ["wait_for_workers", "master_listen_fd"])
def test_the_store_waits_for_nobody_and_listens_where_we_say(name: str) -> None:
    assert name in (TCPStore.__init__.__doc__ or "")


def test_nothing_that_is_unpickled_goes_through_the_store() -> None:
    import weightsync_engine.transfer.rendezvous as module

    assert "pickle" not in inspect.getsource(module)
