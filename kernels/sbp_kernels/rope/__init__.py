"""Norm of each query and key head, then rotary embedding."""

from sbp_kernels.rope.api import QKNormRope, qk_norm_rope, rotary_frequencies

__all__ = ["QKNormRope", "qk_norm_rope", "rotary_frequencies"]
