"""The command `plan`: what an experiment will take, by arithmetic alone."""
