"""How many parameters a model has, and how many floating-point operations its work takes.

A multiplication with a matrix of P parameters takes 2P operations a token forward and 4P backward (Kaplan et al. 2020,
section 2.1). Attention takes 4 H D operations a layer for each (query, key) pair that the mask lets through: scores and
weighted values. Counting those pairs alone, and not T squared, is Megatron-LM's count for packed documents; formulas that
take the whole square (PaLM, Chowdhery et al. 2022, appendix B) flatter a masked model. Norms, activations and the
embedding look-up are left out, as is any recomputation.
"""

from __future__ import annotations

from sbp_fast.config import ModelConfig

PEAK_FLOPS = {"a100": 312e12, "h100": 989.4e12, "h200": 989.4e12, "b200": 2250e12}
"""Dense bfloat16 operations a second of each card, from NVIDIA's data sheets: half of what they state with sparsity."""

DEVICE_NAMES = {
    "NVIDIA A100-SXM4-40GB": "a100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-PCIE-40GB": "a100",
    "NVIDIA A100 80GB PCIe": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
"""Whole names, since slower cards (H100 PCIe, H200 NVL) and slices of one (MIG) have names that begin alike."""


def peak_flops(device_name: str) -> float | None:
    """The peak of a device by its `torch.cuda.get_device_name`; None for one that is not listed, which then has no MFU."""
    card = DEVICE_NAMES.get(device_name)
    return None if card is None else PEAK_FLOPS[card]


def parameters(config: ModelConfig, vocabulary_size: int) -> int:
    """All weights of the model, a tied head counted once."""
    return sum(parameters_by_part(config, vocabulary_size).values())


def parameters_by_part(config: ModelConfig, vocabulary_size: int) -> dict[str, int]:
    """Weights by what they are for; a tied output projection has none of its own."""
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
    """Weights of one layer's projections to queries, keys and values and back."""
    return config.hidden_size * config.head_dim * (2 * config.heads + 2 * config.kv_heads)


def matrix_parameters(config: ModelConfig) -> int:
    """Weights of the layers' projections: what every token is multiplied with."""
    return config.layers * (attention_parameters(config) + 3 * config.hidden_size * config.intermediate_size)


def forward_flops(config: ModelConfig, vocabulary_size: int, tokens: float, visible_pairs: float, head_tokens: float) -> float:
    """Operations of a forward pass.

    Args:
        tokens: that go through the layers.
        visible_pairs: (query, key) pairs of one layer, `PackedLayout.visible_pairs` summed over batches.
        head_tokens: tokens whose logits are computed.
    """
    body = 2.0 * matrix_parameters(config) * tokens
    attention = 4.0 * config.layers * config.heads * config.head_dim * visible_pairs
    return body + attention + 2.0 * vocabulary_size * config.hidden_size * head_tokens


def training_flops(config: ModelConfig, vocabulary_size: int, tokens: float, visible_pairs: float, loss_tokens: float) -> float:
    """Operations of forward and backward: three times the forward, each backward being two products for every one."""
    return 3.0 * forward_flops(config, vocabulary_size, tokens, visible_pairs, loss_tokens)


def palm_flops(config: ModelConfig, vocabulary_size: int, tokens: float, context: int) -> float:
    """Operations of training by the formula in general use, 6N + 12 L d T a token (Chowdhery et al. 2022, appendix B).

    It takes the whole square of the context for attention, masked or not, so that utilisations compare with what others
    publish. N leaves out an embedding that is not the output projection too, for it is looked up and not multiplied with.

    Args:
        context: T, the length of a sequence.
    """
    looked_up = 0 if config.tied_embeddings else vocabulary_size * config.hidden_size
    multiplied = parameters(config, vocabulary_size) - looked_up
    return tokens * (6.0 * multiplied + 12.0 * config.layers * config.heads * config.head_dim * context)
