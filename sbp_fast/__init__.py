"""Synthetic bootstrapped pretraining, whole and fast."""

__version__ = "0.2.0"
