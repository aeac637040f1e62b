"""The ahead-of-time gate: compile every kernel for four GPUs without one, and compare its figures with a committed table."""
