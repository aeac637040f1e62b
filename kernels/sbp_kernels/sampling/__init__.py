"""Sampling of one token a row by temperature, top-k and top-p."""

from sbp_kernels.sampling.api import sample_tokens

__all__ = ["sample_tokens"]
