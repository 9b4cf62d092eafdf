"""A small server in plain torch that speaks vLLM's routes: where vLLM can't run, and beside it in tests."""
