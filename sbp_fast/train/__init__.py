"""The training loop: optimizers, schedules, sharding, checkpoints, metrics and trackers."""
