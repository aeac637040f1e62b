"""How many parameters a model has, and how many floating-point operations its work takes.

A multiplication with a matrix of P parameters takes 2P operations a token forward and 4P backward (Kaplan et al. 2020,
section 2.1). Attention takes 4 H D operations a layer for each (query, key) pair that the mask lets through: scores and
weighted values. Counting those pairs alone, and not T squared, is Megatron-LM's count for packed documents; formulas that
take the whole square (PaLM, Chowdhery et al. 2022, appendix B) flatter a masked model. Norms, activations and the
embedding look-up are left out, as is any recomputation.
"""

from __future__ import annotations

from sbp_fast.config import ModelConfig


def parameters(config: ModelConfig, vocabulary_size: int) -> int:
    """All weights of the model, a tied head counted once."""
    norms = config.layers * 2 * (config.width + config.head_width) + config.width
    embeddings = vocabulary_size * config.width * (1 if config.tied_embeddings else 2)
    return matrix_parameters(config) + norms + embeddings


def matrix_parameters(config: ModelConfig) -> int:
    """Weights of the layers' projections: what every token is multiplied with."""
    attention = config.width * config.head_width * (2 * config.heads + 2 * config.key_value_heads)
    return config.layers * (attention + 3 * config.width * config.feed_forward_width)


def forward_flops(config: ModelConfig, vocabulary_size: int, tokens: float, visible_pairs: float, head_tokens: float) -> float:
    """Operations of a forward pass.

    Args:
        tokens: that go through the layers.
        visible_pairs: (query, key) pairs of one layer, `PackedLayout.visible_pairs` summed over batches.
        head_tokens: tokens whose logits are computed.
    """
    body = 2.0 * matrix_parameters(config) * tokens
    attention = 4.0 * config.layers * config.heads * config.head_width * visible_pairs
    return body + attention + 2.0 * vocabulary_size * config.width * head_tokens


def training_flops(config: ModelConfig, vocabulary_size: int, tokens: float, visible_pairs: float, loss_tokens: float) -> float:
    """Operations of forward and backward: three times the forward, each backward being two products for every one."""
    return 3.0 * forward_flops(config, vocabulary_size, tokens, visible_pairs, loss_tokens)
