"""The agent's decisions: pure, without a clock, a socket or a process.

``start`` gives the state of an agent that was just started; ``step(state, event, now)`` gives the next state and
the effects to be run in order; ``wake_at(state)`` says when a Tick is due at the latest; ``observed(state)`` is
what the operator is told. The product's runner and the simulator drive the same four functions.
"""
