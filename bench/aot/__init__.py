"""The ahead-of-time gate: every kernel compiled for GPUs that need not be here, its figures held to a committed table."""
