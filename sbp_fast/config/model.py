"""The shape of the transformer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from sbp_fast.config.section import Count, Section

Size = Annotated[int, Field(ge=1, le=1_000_000)]


class ModelConfig(Section):
    """The shape of the transformer; names as in Hugging Face's config.json where it has them."""

    layers: Annotated[int, Field(ge=1, le=10_000)] = 4
    hidden_size: Size = 128
    heads: Size = 4
    """Number of query heads."""
    kv_heads: Size = 2
    """Number of key and value heads (grouped-query attention)."""
    head_dim: Size = 32
    intermediate_size: Size = 352
    """Size of the feed-forward layer."""
    rope_theta: Annotated[float, Field(ge=1, le=1e12)] = 10_000.0
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    tied_embeddings: bool = True
    """Use the embedding matrix as the output projection too."""
    qk_norm: bool = True
    """RMSNorm of each query and key head, as in Qwen3; without it the model is a Llama."""
    context: Count = 512
    """Longest chain of positions in a document (a seed and its partner together may take twice this)."""

    @model_validator(mode="after")
    def _heads_fit(self) -> ModelConfig:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads = {self.heads} is no multiple of kv_heads = {self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd, and rotary positions rotate pairs of numbers")
        return self
