"""Attention over a packed sequence of segments."""

from sbp_kernels.attention.api import backend_provenance, packed_attention, resolve_backend
from sbp_kernels.attention.registry import attention_backends, attention_operations, register_attention_backend

__all__ = [
    "attention_backends",
    "attention_operations",
    "backend_provenance",
    "packed_attention",
    "register_attention_backend",
    "resolve_backend",
]
