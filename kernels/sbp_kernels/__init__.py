"""Operations of packed language-model training that any PyTorch stack can use; nothing here knows the trainer."""

from sbp_kernels.attention import packed_attention, resolve_backend
from sbp_kernels.layout import PackedLayout
from sbp_kernels.linear_cross_entropy import linear_cross_entropy

__all__ = ["PackedLayout", "linear_cross_entropy", "packed_attention", "resolve_backend"]
