"""Thin edges to the Kubernetes API, on the official client: plain documents in and out."""
