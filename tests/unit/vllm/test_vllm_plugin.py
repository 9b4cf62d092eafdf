"""The entry point, as every process of vLLM calls it."""

import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec

import pytest

from weightsync_engine.vllm import plugin


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_vllm_finds_it():
    (found,) = [point for point in entry_points(group="vllm.general_plugins") if point.name == "weightsync"]
    assert found.load() is plugin.register


def test_without_weight_transfer_it_does_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    plugin.register()


def test_importing_it_costs_nothing():
    code = "import sys; import weightsync_engine.vllm.plugin; print('torch' in sys.modules, 'vllm' in sys.modules)"
    assert run(code).split() == ["False", "False"]


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make setup")
def test_it_may_be_called_again_and_loads_the_backend_only_when_it_is_used():
    code = """
import sys
from weightsync_engine.vllm.plugin import register
register(), register()
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as factory
assert 'weightsync_engine.vllm.backend' not in sys.modules
print(factory._registry['weightsync']().__name__)
"""
    assert run(code).split()[-1] == "WeightSyncBackend"
