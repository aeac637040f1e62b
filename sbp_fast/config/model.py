"""The shape of the transformer."""

from __future__ import annotations

from pydantic import model_validator

from sbp_fast.config.section import Count, Section


class ModelConfig(Section):
    layers: Count = 4
    width: Count = 128
    heads: Count = 4
    key_value_heads: Count = 2
    head_width: Count = 32
    feed_forward_width: Count = 352
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-6
    tied_embeddings: bool = True
    query_key_norm: bool = True
    """RMSNorm of each query and key head, as Qwen3 has it; without it the model is a Llama."""
    context: Count = 512
    """Longest chain of positions (a seed and its partner together may take twice this)."""

    @model_validator(mode="after")
    def _heads_fit(self) -> ModelConfig:
        if self.heads % self.key_value_heads:
            raise ValueError(f"heads = {self.heads} is no multiple of key_value_heads = {self.key_value_heads}")
        if self.head_width % 2:
            raise ValueError(f"head_width = {self.head_width} is odd, and rotary positions turn pairs")
        return self
