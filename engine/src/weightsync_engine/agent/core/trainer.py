"""What the trainer's agent does besides the transfer: keep copies, tell the trainer how its fleet is."""

from dataclasses import replace

from weightsync_contract.reasons import Role
from weightsync_engine.agent.core.effects import Effect, Effects, Pin, Retain, TellFleet
from weightsync_engine.agent.core.state import State


def rules(state: State) -> tuple[State, Effects]:
    """Follow the operator's word; without one, keep what is kept."""
    desired = state.desired.taken
    if state.role is not Role.TRAINER or desired is None:
        return state, ()
    effects: list[Effect] = []
    # The pin comes first: a version about to be sent must not fall out because fewer are to be kept.
    wanted, current = desired.wanted, desired.fleet.current
    # However many failed after it: what the fleet serves is what a late joiner or a restarted engine needs.
    needed = (wanted.version if wanted else None, current, *desired.keep)
    pinned = tuple(dict.fromkeys(version for version in needed if version))
    if pinned != state.pinned:
        effects.append(Pin(pinned))
    if desired.retained_versions != state.retained:
        effects.append(Retain(desired.retained_versions))
    if desired.fleet != state.fleet:
        effects.append(TellFleet(desired.fleet))
    if not effects:
        return state, ()
    state = replace(state, pinned=pinned, retained=desired.retained_versions, fleet=desired.fleet)
    return state, tuple(effects)
