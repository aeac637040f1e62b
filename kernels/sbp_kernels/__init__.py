"""Operations of packed language-model training that any PyTorch stack can use; independent of the trainer."""

from sbp_kernels.attention import (
    attention_backends,
    attention_operations,
    backend_provenance,
    packed_attention,
    register_attention_backend,
    resolve_backend,
)
from sbp_kernels.decode import DecodeLayout, append_to_pages, decode_attention
from sbp_kernels.integrations.varlen import flash_attn_varlen_func
from sbp_kernels.layout import PackedLayout
from sbp_kernels.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy, loss_rows_of
from sbp_kernels.nearest import nearest_in_buckets
from sbp_kernels.norm import RMSNorm, rms_norm
from sbp_kernels.repeats import repeats
from sbp_kernels.rope import QKNormRope, qk_norm_rope
from sbp_kernels.sampling import sample_tokens
from sbp_kernels.swiglu import SwiGLU, swiglu, swiglu_linear

__all__ = [
    "DecodeLayout",
    "LinearCrossEntropy",
    "PackedLayout",
    "QKNormRope",
    "RMSNorm",
    "SwiGLU",
    "append_to_pages",
    "attention_backends",
    "attention_operations",
    "backend_provenance",
    "decode_attention",
    "flash_attn_varlen_func",
    "linear_cross_entropy",
    "loss_rows_of",
    "nearest_in_buckets",
    "packed_attention",
    "qk_norm_rope",
    "register_attention_backend",
    "repeats",
    "resolve_backend",
    "rms_norm",
    "sample_tokens",
    "swiglu",
    "swiglu_linear",
]
