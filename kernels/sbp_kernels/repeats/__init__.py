"""Detection of texts that repeat themselves while they are generated."""

from sbp_kernels.repeats.api import repeats

__all__ = ["repeats"]
