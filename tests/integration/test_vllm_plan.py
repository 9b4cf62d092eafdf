"""Versions brought into real vLLM by the recorded plan: several model families, one and two ranks, bit by bit.

``plain``: linear layers lie as checkpoints have them, as on GPUs, so that the plan does nearly all. ``packed``:
as vLLM packs them for CPUs, so that plan and vLLM's own loading share a model.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from engine_server import need_vllm
from vllm_models import LAYERS

from weightsync_demo.processes import environment

PROBE = Path(__file__).resolve().parent.parent / "support" / "vllm_plan_probe.py"
SECONDS = 540
RUNS = {
    "plain": (1, "plain", ("tied", "biased", "experts", "fused", "sliding")),
    "packed": (1, "packed", ("tied", "experts")),
    "plain-tp2": (2, "plain", ("experts", "fused")),
}
CASES = [(run, kind) for run, (_, _, kinds) in RUNS.items() for kind in kinds]
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(SECONDS + 60)]


class Probes:
    """Runs a probe once for all its kinds."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._found: dict[str, dict] = {}

    def __call__(self, run: str, kind: str) -> dict:
        if run not in self._found:
            self._found[run] = self._run(run)
        return self._found[run][kind]

    def _run(self, run: str) -> dict:
        ranks, layout, kinds = RUNS[run]
        home = self._factory.mktemp(run)
        log = home / "log"
        with log.open("w") as stderr:
            done = subprocess.run(
                [sys.executable, str(PROBE), str(ranks), layout, str(home / "models"), *kinds],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                timeout=SECONDS,
                check=False,
                env=environment({"VLLM_CACHE_ROOT": str(home / "cache")}),
            )
        assert done.returncode == 0, log.read_text()[-3000:]
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"kind"')]
        assert [row["kind"] for row in found] == list(kinds)
        return {row["kind"]: row for row in found}


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    need_vllm()
    return Probes(tmp_path_factory)


@pytest.fixture(params=CASES, ids=[f"{run}-{kind}" for run, kind in CASES])
def case(request, probes):
    run, kind = request.param
    return run, kind, probes(run, kind)


def test_the_first_version_goes_vllms_way_and_all_others_by_the_plan(case):
    run, _, found = case
    first, *later = found["applied"]
    assert len(first) == RUNS[run][0]
    for rank in first:
        assert rank["why_own"] == "the first version of a layout"
        assert rank["holds"]
    for version in later:
        for rank in version:
            assert rank["why_own"] == ""
            assert rank["holds"]
            assert rank["compared"] in rank["planned"]


def test_the_parameters_are_those_of_a_fresh_load_bit_by_bit(case):
    _, _, found = case
    one, two, one_again, two_again = found["parameters"]
    assert two == two_again == found["fresh"]["parameters"]
    assert one == one_again
    assert all(mine != other for mine, other in zip(one[0].values(), two[0].values(), strict=True))


def test_tokens_and_logprobs_are_those_of_a_fresh_engine(case):
    _, _, found = case
    one, two, one_again, two_again = found["answers"]
    assert two == two_again == found["fresh"]["answer"]
    assert one == one_again != two


def test_what_lies_as_in_checkpoints_is_planned_and_nothing_else(case):
    run, kind, found = case
    for rank in found["applied"][-1]:
        slow = {name: why for name, why in rank["slow"].items() if "experts" not in name}
        if run == "packed":
            assert slow
            assert set(slow.values()) == {"weight is kept in another layout than checkpoints have"}
        else:
            assert not slow
            assert "model.layers.1.self_attn.qkv_proj" in rank["planned"]
        # vLLM's kernels for CPUs pack experts, in the same shape or in a larger one.
        experts = {name for name in rank["slow"] if "experts" in name}
        assert bool(experts) == (kind == "experts")
        assert {"model.embed_tokens", "model.norm"} <= set(rank["planned"])


def test_neighbours_are_copied_together(case):
    run, kind, found = case
    (rank, *_) = found["applied"][-1]
    # Tensors that are fused where they are published are one copy a parameter on one rank.
    if (run, kind) == ("plain", "fused"):
        assert rank["copies"] == rank["planned_modules"]
    # In the order of names gate and up lie side by side, k, o, q and v do not: three copies make a qkv_proj.
    if (run, kind) == ("plain", "tied"):
        assert rank["copies"] == rank["planned_modules"] + 2 * LAYERS
