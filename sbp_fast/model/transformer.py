"""The decoder: RMSNorm, rotary positions, grouped-query attention with query/key norm, SwiGLU (the shapes of Qwen3).

Tensor suffixes: T tokens of the packed stream, W model width, H query heads, K key/value heads, D head width,
F feed-forward width, V vocabulary. There is no batch dimension: a batch is one stream and its layout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sbp_kernels import PackedLayout, linear_cross_entropy, packed_attention
from torch import Tensor, nn

from sbp_fast.config import ModelConfig


class Attention(nn.Module):
    """Self-attention; `project` and `output` stand apart so that the generator can put its cache between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.key_value_heads, self.head_width = config.heads, config.key_value_heads, config.head_width
        rows = (config.heads + 2 * config.key_value_heads) * config.head_width
        self.qkv_proj = nn.Linear(config.width, rows, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_width, config.width, bias=False)
        self.q_norm = nn.RMSNorm(config.head_width, config.norm_epsilon)
        self.k_norm = nn.RMSNorm(config.head_width, config.norm_epsilon)

    def project(self, x_TW: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, D], keys and values [T, K, D], normed and rotated; `rotation` is cosine and sine [T, 1, D].

        Norm and rotation are computed in the dtype of the weights, which under autocast is not that of the projection.
        """
        heads = [self.heads, self.key_value_heads, self.key_value_heads]
        q_THD, k_TKD, v_TKD = self.qkv_proj(x_TW).unflatten(-1, (-1, self.head_width)).split(heads, dim=-2)
        dtype = self.q_norm.weight.dtype
        q_THD, k_TKD = self.q_norm(q_THD.to(dtype)), self.k_norm(k_TKD.to(dtype))
        return rotate(q_THD, rotation).to(v_TKD.dtype), rotate(k_TKD, rotation).to(v_TKD.dtype), v_TKD

    def output(self, out_THD: Tensor) -> Tensor:
        return self.o_proj(out_THD.flatten(-2))

    def forward(self, x_TW: Tensor, layout: PackedLayout, rotation: tuple[Tensor, Tensor], backend: str) -> Tensor:
        q_THD, k_TKD, v_TKD = self.project(x_TW, rotation)
        return self.output(packed_attention(q_THD, k_TKD, v_TKD, layout, backend=backend))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), gate and up in one projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.width, 2 * config.feed_forward_width, bias=False)
        self.down_proj = nn.Linear(config.feed_forward_width, config.width, bias=False)

    def forward(self, x_TW: Tensor) -> Tensor:
        gate_TF, up_TF = self.gate_up_proj(x_TW).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate_TF) * up_TF)


class Block(nn.Module):
    """One layer, normed before attention and before the feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.width, config.norm_epsilon)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.width, config.norm_epsilon)
        self.mlp = FeedForward(config)

    def forward(self, x_TW: Tensor, layout: PackedLayout, rotation: tuple[Tensor, Tensor], backend: str) -> Tensor:
        x_TW = x_TW + self.self_attn(self.input_layernorm(x_TW), layout, rotation, backend)
        return x_TW + self.mlp(self.post_attention_layernorm(x_TW))


class Transformer(nn.Module):
    """The language model over packed streams."""

    def __init__(self, config: ModelConfig, vocabulary_size: int) -> None:
        super().__init__()
        self.config, self.vocabulary_size = config, vocabulary_size
        self.embed_tokens = nn.Embedding(vocabulary_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.norm_epsilon)
        self.lm_head = nn.Linear(config.width, vocabulary_size, bias=False)
        if config.tied_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def initialize(self, seed: int) -> None:
        """Draw all weights: a projection normal with deviation 1/sqrt(its inputs), embeddings with 0.02.

        Projections back into the stream are scaled by 1/sqrt(2 layers) (Radford et al. 2019, section 2.3), so that depth
        does not widen the stream.
        """
        generator = torch.Generator().manual_seed(seed)
        into_stream = ("o_proj.weight", "down_proj.weight")
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() < 2:
                    parameter.fill_(1.0)
                    continue
                deviation = 0.02 if name == "embed_tokens.weight" else parameter.shape[1] ** -0.5
                if name.endswith(into_stream):
                    deviation /= (2 * self.config.layers) ** 0.5
                parameter.copy_(torch.empty(parameter.shape).normal_(0, deviation, generator=generator))

    def rotation(self, positions_T: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Cosine and sine [T, 1, D] of the rotary embedding at the given positions (Su et al. 2021, section 3.2.2)."""
        exponents = (
            torch.arange(0, self.config.head_width, 2, device=positions_T.device, dtype=torch.float32) / self.config.head_width
        )
        angles = positions_T.float().unsqueeze(-1) / self.config.rope_base**exponents
        angles_T1D = torch.cat([angles, angles], -1).unsqueeze(-2)
        return angles_T1D.cos().to(dtype), angles_T1D.sin().to(dtype)

    def forward(self, tokens_T: Tensor, layout: PackedLayout, backend: str = "auto") -> Tensor:
        """Hidden states [T, W] after the last norm; `logits` or `loss` goes on from there."""
        x_TW = self.embed_tokens(tokens_T)
        rotation = self.rotation(layout.positions, x_TW.dtype)
        for block in self.layers:
            x_TW = block(x_TW, layout, rotation, backend)
        return self.norm(x_TW)

    def logits(self, hidden_TW: Tensor) -> Tensor:
        """[T, V]."""
        return self.lm_head(hidden_TW)

    def loss(self, tokens_T: Tensor, targets_T: Tensor, layout: PackedLayout, backend: str = "auto") -> Tensor:
        """Sum of the cross-entropy, in nats, over the tokens whose target is not -100."""
        return linear_cross_entropy(self(tokens_T, layout, backend), self.lm_head.weight, targets_T)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device


def rotate(x_THD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding with the two halves of a head paired, as Qwen3 and Llama store it."""
    cosine, sine = rotation
    first, second = x_THD.chunk(2, dim=-1)
    return x_THD * cosine + torch.cat([-second, first], -1) * sine
