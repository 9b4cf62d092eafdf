"""The operator's decisions, pure: no I/O, no clock, no randomness; everything comes in as a World."""
