"""Output projection and cross-entropy in one, over the rows that carry loss."""

from sbp_kernels.linear_cross_entropy.api import (
    LinearCrossEntropy,
    linear_cross_entropy,
    loss_rows_of,
    resolve_mode,
    select_loss_rows,
)

__all__ = ["LinearCrossEntropy", "linear_cross_entropy", "loss_rows_of", "resolve_mode", "select_loss_rows"]
