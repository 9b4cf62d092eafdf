"""The operator's side of the session: one WebSocket an agent, whole states both ways."""
