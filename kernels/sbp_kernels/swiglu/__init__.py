"""SwiGLU, alone or with the projection after it."""

from sbp_kernels.swiglu.api import SwiGLU, swiglu, swiglu_linear

__all__ = ["SwiGLU", "swiglu", "swiglu_linear"]
