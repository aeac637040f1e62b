"""The live page of a run: made from the run's own files, served on this machine alone, read-only."""
