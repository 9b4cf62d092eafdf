"""A socket of its own for each process of an engine, and what its agent can ask there.

Answers over an engine's own call channel may block behind a step, or be those to another call once a rank has
failed. What is asked here is answered by a thread, by this rank and to this question. Standard library and
contract only.
"""
