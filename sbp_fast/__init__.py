"""Synthetic bootstrapped pretraining, whole and fast."""

__version__ = "0.1.0"
