"""The preflight against several of vLLM's model families, each in a process of its own.

Nothing here tells the engine what shapes a checkpoint has: the model's own loaders are all there is to ask.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from engine_server import need_vllm

from weightsync_demo.processes import environment

PROBE = Path(__file__).resolve().parent.parent / "support" / "vllm_loader_probe.py"
SECONDS = 240
PARAMETER = {
    "tied": "model.layers.0.mlp.gate_up_proj.weight",
    "biased": "model.layers.0.mlp.gate_up_proj.weight",
    "experts": "model.layers.0.mlp.experts",
}
TENSOR = dict.fromkeys(PARAMETER, "model.layers.0.mlp") | {"experts": "model.layers.0.mlp.experts.0"}


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=pytest.mark.vllm) for kind in PARAMETER])
def found(request, tmp_path_factory):
    need_vllm()
    home = tmp_path_factory.mktemp(request.param)
    log = home / "log"
    with log.open("w") as stderr:
        done = subprocess.run(
            [sys.executable, str(PROBE), request.param, str(home / "model")],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            timeout=SECONDS,
            check=False,
            env=environment({"VLLM_CACHE_ROOT": str(home / "cache")}),
        )
    assert done.returncode == 0, log.read_text()[-3000:]
    return {"kind": request.param, **json.loads(done.stdout.splitlines()[-1])}


def test_what_the_model_takes_is_taken_in_any_order_and_again(found):
    assert found["good"] == found["again"] == found["shuffled"] == []


def test_the_live_model_is_not_touched(found):
    assert found["untouched"] is True


def test_a_tensor_that_is_missing_is_found(found):
    (problem,) = found["short"]
    assert problem.startswith(PARAMETER[found["kind"]])
    assert "elements would be loaded" in problem


def test_a_bias_that_is_missing_is_found(found):
    if found["kind"] == "biased":
        (problem,) = found["no bias"]
        assert problem.startswith("model.layers.0.self_attn.qkv_proj.bias: 128 of its 256 elements")


def test_a_name_that_nobody_takes_is_found(found):
    assert f"{TENSOR[found['kind']]}.other_proj.weight: the model has no such tensor" in found["renamed"][0]


def test_a_silent_cast_is_found(found):
    (problem,) = found["cast"]
    assert "has dtype bfloat16, the model keeps it as float32" in problem


def test_another_shape_is_found(found):
    (problem,) = found["larger"]
    assert problem.startswith(f"{TENSOR[found['kind']]}.up_proj.weight: has shape [96, ")


def test_an_output_layer_that_is_the_embedding_may_be_published_or_not(found):
    if found["kind"] == "tied":
        assert found["with the output layer"] == []
