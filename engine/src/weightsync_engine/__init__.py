"""What runs in pods: the agent, the data planes, the trainer's client and the adapters for inference engines."""
