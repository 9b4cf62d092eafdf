"""Both real cores in virtual time, with everything failing that can: what is promised holds.

A seed that fails prints how to see it again: WEIGHTSYNC_SEED=<seed> pytest tests/simulation -k replay -s
"""

import os

import pytest
from simulated_fleet import Simulation

SEEDS = int(os.environ.get("WEIGHTSYNC_SEEDS", "200"))


def play(seed: int, faults: bool = True) -> Simulation:
    simulation = Simulation(seed, faults)
    try:
        simulation.run()
    except AssertionError as error:
        tail = "\n".join(simulation.history.log[-60:])
        replay = f"WEIGHTSYNC_SEED={seed} python -m pytest tests/simulation -k replay -s"
        raise AssertionError(f"seed {seed}: {error}\n{tail}\nto see it again: {replay}") from error
    return simulation


@pytest.mark.parametrize("block", range(10))
def test_random_lives_of_a_fleet(block: int) -> None:
    for seed in range(block * SEEDS // 10, (block + 1) * SEEDS // 10):
        play(seed)


@pytest.mark.parametrize("seed", range(5))
def test_without_faults_everybody_gets_every_version_in_few_writes(seed: int) -> None:
    simulation = play(seed, faults=False)
    assert all(simulation.serves(member) for member in simulation.members)
    # Two a step of each version, besides.
    assert simulation.history.writes <= 20 + 2 * len(simulation.spec.waves) * simulation.versions


@pytest.mark.skipif("WEIGHTSYNC_SEED" not in os.environ, reason="no WEIGHTSYNC_SEED to see again")
def test_replay() -> None:
    simulation = Simulation(int(os.environ["WEIGHTSYNC_SEED"]))
    try:
        simulation.run()
    finally:
        print("\n".join(simulation.history.log))
