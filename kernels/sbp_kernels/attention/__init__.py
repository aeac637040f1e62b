"""Attention over a packed stream of segments."""

from sbp_kernels.attention.api import packed_attention, resolve_backend

__all__ = ["packed_attention", "resolve_backend"]
