"""Bringing a version from the trainer to every member, as one broadcast of its bytes."""
