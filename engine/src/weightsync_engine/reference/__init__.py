"""A small server in plain torch that speaks vLLM's routes, for machines that vLLM has no wheel for.

It is no fake of the product: the guard, the worker socket and the commit are the very ones that vLLM gets,
and one test suite runs against both. What stands in is the model's arithmetic and the HTTP server.
"""
