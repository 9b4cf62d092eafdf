"""The agent's decisions: pure, without a clock, a socket or a process.

``start`` gives the state of an agent that was just started; ``step(state, event, now)`` gives the next state
and the effects to be run in order; ``wake_at(state, now)`` says when a Tick is due at the latest;
``observed(state)`` is what the operator is told. The product's runner and the simulator drive the same four.
"""

from weightsync_engine.agent.core.report import observed
from weightsync_engine.agent.core.state import State, start
from weightsync_engine.agent.core.step import step, wake_at

__all__ = ["State", "observed", "start", "step", "wake_at"]
