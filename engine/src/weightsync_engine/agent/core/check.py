"""Can the engine take a layout? Asked of each boot anew, and known before any byte moves or is applied."""

from dataclasses import replace

from weightsync_contract.reasons import FailureCode, Role
from weightsync_engine.agent.core.effects import Effects, Preflight
from weightsync_engine.agent.core.events import PreflightEnded
from weightsync_engine.agent.core.state import RETRY_SECONDS, StagingState, State

KEPT_LAYOUTS = 8
"""Manifests kept; one layout is the rule, a second comes with a new model."""


def know(state: State, layout: str) -> State:
    """The edge keeps the manifest of this layout from now on, as one of the newest."""
    check = state.check
    known = (*(each for each in check.known if each != layout), layout)[-KEPT_LAYOUTS:]
    if check.layout == layout and check.code is not None:
        # It comes round again because somebody wants to know again: a refusal is no answer for ever.
        check = replace(check, boot="", layout="", code=None, message="")
    return replace(state, check=replace(check, known=known))


def answered(state: State, event: PreflightEnded, now: float) -> State:
    """The engine said yes or no, or could not be asked."""
    check = state.check
    if check.asking != (event.boot, event.layout):
        return state
    check = replace(
        check,
        boot=event.boot,
        layout=event.layout,
        code=event.code,
        message=event.message,
        asking=None,
        retry_at=now + RETRY_SECONDS,
    )
    return replace(state, check=check)


def answer(state: State, layout: str) -> tuple[FailureCode | None, str] | None:
    """What the running engine said to a layout; None while it has not said it."""
    check = state.check
    if (
        check.boot != state.engine.boot
        or check.layout != layout
        or check.code is FailureCode.ENGINE_UNREACHABLE
    ):
        return None
    return check.code, check.message


def ask(state: State, now: float) -> tuple[State, Effects]:
    """Ask for the layout that matters most, unless that was answered or is being asked."""
    if state.role is Role.TRAINER or not state.engine.reachable:
        return state, ()
    layout, boot, check = _needed(state), state.engine.boot, state.check
    if not layout or answer(state, layout) is not None or check.asking == (boot, layout):
        return state, ()
    if (check.boot, check.layout) == (boot, layout) and now < check.retry_at:
        return state, ()
    return replace(state, check=replace(check, asking=(boot, layout))), (Preflight(boot, layout),)


def wake_at(state: State) -> float | None:
    """When an engine that could not be asked is to be asked again."""
    check = state.check
    unasked = check.code is FailureCode.ENGINE_UNREACHABLE and check.asking is None
    return check.retry_at if unasked and state.engine.reachable else None


def _needed(state: State) -> str:
    desired, staging, known = state.desired.taken, state.staging, state.check.known
    staged = staging.wanted.layout if staging.state is StagingState.STAGED and staging.wanted else ""
    wanted = desired.wanted.layout if desired and desired.wanted else ""
    committing = desired and staging.wanted and desired.commit == staging.wanted.version
    for layout in (staged if committing else "", wanted, staged, known[-1] if known else ""):
        if layout in known:
            return layout
    return ""
