"""The one decision: from all that is known to all that is to be done. Pure.

First the gates, in this order: a leader that another one has replaced stands down; a term is written
before anything is said under it; the last leader's agents are waited for; a spec that asks for more than
there is moves nothing. Then the rules (rules.py), until none has anything more to say.
"""

from dataclasses import replace

from weightsync_contract.reasons import Reason
from weightsync_operator.core import takeover
from weightsync_operator.core.actions import act
from weightsync_operator.core.conditions import merge, unsupported, waiting_for_roster
from weightsync_operator.core.desired import desired
from weightsync_operator.core.facts import Facts, State, read
from weightsync_operator.core.limits import QUIET
from weightsync_operator.core.memory import Memory
from weightsync_operator.core.model import Plan, Status, World
from weightsync_operator.core.report import fleet_view, noted, view, written
from weightsync_operator.core.rules import settle
from weightsync_operator.core.wake import requeue_after
from weightsync_operator.core.waves import probe


def decide(world: World, memory: Memory) -> tuple[Plan, Memory]:
    """What to do now, and what to remember once it is done. See Plan for the order in which it is done."""
    if memory.term and world.status.term > memory.term:
        return Plan(world.status, stand_down=True), memory
    term = takeover.term_to_write(world, memory)
    if term is not None:
        plan = Plan(replace(_unwiped(world, memory), term=term), requeue_after=0.0)
        return plan, replace(memory, term=term)
    facts, state = read(world, memory), State(memory, _unwiped(world, memory))
    if not memory.adopted:
        absent = takeover.missing(world)
        deadline = world.leading_since + world.spec.timeouts.join
        if absent and world.now < deadline:
            return _wait_for_roster(facts, state, absent, deadline), memory
        state = takeover.adopt(facts, state)
    if world.spec.unsupported:
        return _unsupported(facts, state)
    state = written(facts, noted(facts, settle(facts, act(facts, state))))
    plan = Plan(
        status=state.status,
        desired=desired(facts, state),
        notes=state.notes,
        requeue_after=requeue_after(facts, state),
        probe=probe(facts, state),
        view=view(facts, state),
    )
    return plan, replace(state.memory, kept=state.status)


def _unwiped(world: World, memory: Memory) -> Status:
    """The status; what somebody wiped of it while we lead is put back, since it is known."""
    status, kept = world.status, memory.kept
    wiped = status.current is None and status.rollout is None and status.group is None
    if kept is None or not wiped or not memory.adopted:
        return status
    return replace(kept, term=status.term)


def _wait_for_roster(facts: Facts, state: State, absent: list[str], deadline: float) -> Plan:
    """Agents go on with what they were told; nothing is said that could stop them."""
    now, rows = facts.now, waiting_for_roster(absent)
    moments = [deadline]
    if now < facts.world.leading_since + QUIET:
        moments.append(facts.world.leading_since + QUIET)
    else:
        state = state.write(conditions=merge(facts, state.status.conditions, rows))
    _, reason, message = next(iter(rows.values()))
    return Plan(
        state.status,
        requeue_after=min(moments) - now + 0.001,
        view=fleet_view(facts, state, reason, message),
    )


def _unsupported(facts: Facts, state: State) -> tuple[Plan, Memory]:
    """Nothing is said to anybody: all keep what they have."""
    rows = unsupported(facts)
    state = state.remember(round=None, epoch=None).write(
        observed_generation=facts.world.generation,
        conditions=merge(facts, state.status.conditions, rows),
    )
    message = next(iter(rows.values()))[2]
    return (
        Plan(state.status, view=fleet_view(facts, state, Reason.UNSUPPORTED, message)),
        state.memory,
    )
