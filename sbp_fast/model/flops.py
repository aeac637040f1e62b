"""Counts of a model's parameters and of the floating-point operations of its passes.

A multiplication with a matrix of P parameters takes 2P operations a token forward and 4P backward (Kaplan et al. 2020,
section 2.1). Attention takes 4 H D operations a layer for each (query, key) pair that the mask allows: scores and
weighted values. Only allowed pairs are counted, as Megatron-LM does for packed documents; formulas that count all T squared
pairs (PaLM, Chowdhery et al. 2022, appendix B) overstate the work of a masked model. Norms, activations, the embedding
look-up and recomputation are not counted.
"""

from __future__ import annotations

from sbp_fast.config import ModelConfig

PEAK_FLOPS = {"a100": 312e12, "h100": 989.4e12, "h200": 989.4e12, "b200": 2250e12}
"""Dense bfloat16 operations a second of each card, from NVIDIA's data sheets: half of the figure with sparsity."""

DEVICE_NAMES = {
    "NVIDIA A100-SXM4-40GB": "a100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-PCIE-40GB": "a100",
    "NVIDIA A100 80GB PCIe": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
"""Complete device names: slower cards (H100 PCIe, H200 NVL) and MIG slices have names that begin the same."""


def peak_flops(device_name: str) -> float | None:
    """Return the peak of a device by its `torch.cuda.get_device_name`; None for a device that is not listed."""
    card = DEVICE_NAMES.get(device_name)
    return None if card is None else PEAK_FLOPS[card]


def parameters(config: ModelConfig, vocabulary_size: int) -> int:
    """Return the number of weights of the model; tied embeddings count once."""
    return sum(parameters_by_part(config, vocabulary_size).values())


def parameters_by_part(config: ModelConfig, vocabulary_size: int) -> dict[str, int]:
    """Return the number of weights of each part of the model; a tied output projection has none of its own."""
    table = vocabulary_size * config.hidden_size
    norm_widths = 2 * config.hidden_size + (2 * config.head_dim if config.qk_norm else 0)
    return {
        "embedding": table,
        "attention": config.layers * attention_parameters(config),
        "feed-forward": config.layers * 3 * config.hidden_size * config.intermediate_size,
        "norms": config.layers * norm_widths + config.hidden_size,
        "output projection": 0 if config.tied_embeddings else table,
    }


def attention_parameters(config: ModelConfig) -> int:
    """Return the number of weights of one layer's attention projections."""
    return config.hidden_size * config.head_dim * (2 * config.heads + 2 * config.kv_heads)


def matrix_parameters(config: ModelConfig) -> int:
    """Return the number of weights of all layers' projections, which every token is multiplied with."""
    return config.layers * (attention_parameters(config) + 3 * config.hidden_size * config.intermediate_size)


def forward_flops(config: ModelConfig, vocabulary_size: int, tokens: float, visible_pairs: float, head_tokens: float) -> float:
    """Return the operations of a forward pass.

    Args:
        config: shape of the model.
        vocabulary_size: number of rows of the output projection.
        tokens: number of tokens that go through the layers.
        visible_pairs: (query, key) pairs of one layer, `PackedLayout.visible_pairs` summed over batches.
        head_tokens: number of tokens whose logits are computed.
    """
    body = 2.0 * matrix_parameters(config) * tokens
    attention = 4.0 * config.layers * config.heads * config.head_dim * visible_pairs
    return body + attention + 2.0 * vocabulary_size * config.hidden_size * head_tokens


def training_flops(config: ModelConfig, vocabulary_size: int, tokens: float, visible_pairs: float, loss_tokens: float) -> float:
    """Return the operations of forward and backward pass: three times those of the forward pass (see `forward_flops`)."""
    return 3.0 * forward_flops(config, vocabulary_size, tokens, visible_pairs, loss_tokens)


def palm_flops(config: ModelConfig, vocabulary_size: int, tokens: float, context: int) -> float:
    """Return the operations of training by the usual formula, 6N + 12 L d T a token (Chowdhery et al. 2022, appendix B).

    Attention counts all pairs of the context, masked or not, so that utilisations compare with published ones. N leaves out
    an embedding that is not tied to the output projection, since it is looked up and not multiplied with.

    Args:
        config: shape of the model.
        vocabulary_size: number of rows of the embedding and of the output projection.
        tokens: number of tokens trained on.
        context: T, the length of a sequence.
    """
    looked_up = 0 if config.tied_embeddings else vocabulary_size * config.hidden_size
    multiplied = parameters(config, vocabulary_size) - looked_up
    return tokens * (6.0 * multiplied + 12.0 * config.layers * config.heads * config.head_dim * context)
