"""RMSNorm, alone or with the residual addition before it."""

from sbp_kernels.norm.api import RMSNorm, rms_norm

__all__ = ["RMSNorm", "rms_norm"]
