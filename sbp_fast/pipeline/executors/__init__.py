"""Executors of a stage's tasks: processes of this machine, or a Ray cluster."""
