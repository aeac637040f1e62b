"""The shape of the transformer."""

from __future__ import annotations

from pydantic import model_validator

from sbp_fast.config.section import Count, Section


class ModelConfig(Section):
    layers: Count = 4
    hidden_size: Count = 128
    heads: Count = 4
    kv_heads: Count = 2
    head_dim: Count = 32
    intermediate_size: Count = 352
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tied_embeddings: bool = True
    qk_norm: bool = True
    """RMSNorm of each query and key head, as Qwen3 has it; without it the model is a Llama."""
    context: Count = 512
    """Longest chain of positions (a seed and its partner together may take twice this)."""

    @model_validator(mode="after")
    def _heads_fit(self) -> ModelConfig:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads = {self.heads} is no multiple of kv_heads = {self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd, and rotary positions turn pairs")
        return self
