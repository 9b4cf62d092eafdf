"""``weightsync`` and ``kubectl weightsync``: see a fleet, steer it, and find trouble before it bites."""
