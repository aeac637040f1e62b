"""Nearest neighbours within the buckets of an inverted file."""

from sbp_kernels.nearest.api import nearest_in_buckets

__all__ = ["nearest_in_buckets"]
