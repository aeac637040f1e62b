"""The transformer: RMSNorm, rotary positions, grouped-query attention and SwiGLU, in the shapes of Qwen3 or Llama.

Parameters are read only within a module's `forward`, where `fully_shard` has gathered them. Exceptions are `project` and
`output`, which the generator calls alone, and `logits`; they are for models that are not sharded.

Tensor suffixes: T tokens of the packed sequence, W hidden size, H query heads, K key/value heads, D head dimension,
F intermediate size, V vocabulary size, R rows that may carry loss. There is no batch dimension: a batch is one packed sequence
and its layout.
"""

from __future__ import annotations

import torch
import xxhash
from sbp_kernels import PackedLayout, RMSNorm, linear_cross_entropy, packed_attention, qk_norm_rope, swiglu
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sbp_fast.config import ModelConfig


class Attention(nn.Module):
    """Self-attention; `project` and `output` are separate so that the generator can put its cache between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.rope_theta, self.norm_eps = config.rope_theta, config.norm_eps
        rows = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def project(self, x_TW: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [T, H, D], keys and values [T, K, D] in the dtype of the projection, normed and rotated.

        Args:
            x_TW: normed input of the layer.
            positions_T: int32 or int64, the rotary position of each token.
        """
        return qk_norm_rope(
            self.qkv_proj(x_TW),
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            positions_T,
            heads=self.heads,
            key_value_heads=self.kv_heads,
            rope_base=self.rope_theta,
            epsilon=self.norm_eps,
        )

    def output(self, out_THD: Tensor) -> Tensor:
        """Project the result of attention [T, H, D] back to [T, W]."""
        return self.o_proj(out_THD.flatten(-2))

    def forward(self, x_TW: Tensor, layout: PackedLayout, backend: str) -> Tensor:
        """Return [T, W]."""
        q_THD, k_TKD, v_TKD = self.project(x_TW, layout.positions)
        return self.output(packed_attention(q_THD, k_TKD, v_TKD, layout, backend=backend))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), gate and up in one projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TW: Tensor) -> Tensor:
        """Return [T, W]."""
        # not `swiglu_linear`, which reads the weight directly: float8 training replaces the module `down_proj`
        return self.down_proj(swiglu(self.gate_up_proj(x_TW)))


class Block(nn.Module):
    """One layer, normed before attention and before the feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x_TW: Tensor, layout: PackedLayout, backend: str) -> Tensor:
        """Return [T, W]."""
        attended_TW = self.self_attn(self.input_layernorm(x_TW), layout, backend)
        # under autocast the residual stream has a wider dtype than the result of a projection
        normed_TW, x_TW = self.post_attention_layernorm(attended_TW.to(x_TW.dtype), x_TW)
        return x_TW + self.mlp(normed_TW)


class Transformer(nn.Module):
    """The language model over packed sequences.

    It has no buffers, and tied embeddings are one parameter. A model created on the meta device therefore needs only
    `to_empty` and `initialize`, before or after `fully_shard`.
    """

    def __init__(self, config: ModelConfig, vocabulary_size: int) -> None:
        super().__init__()
        self.config, self.vocabulary_size = config, vocabulary_size
        self.embed_tokens = nn.Embedding(vocabulary_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = None if config.tied_embeddings else nn.Linear(config.hidden_size, vocabulary_size, bias=False)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Initialise all weights: projections from a normal distribution of deviation 1/sqrt(inputs), embeddings of 0.02.

        Projections back into the residual stream are scaled by 1/sqrt(2 layers) (Radford et al. 2019, section 2.3), so that
        depth does not increase its variance.

        Each parameter has its own generator, on its device, seeded by `seed` and its name, and is sampled whole in float32:
        weights do not depend on how they are sharded. They differ between kinds of device, whose generators differ.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0)
                continue
            deviation = 0.02 if name == "embed_tokens.weight" else parameter.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                deviation /= (2 * self.config.layers) ** 0.5
            generator = torch.Generator(parameter.device).manual_seed(xxhash.xxh3_64_intdigest(f"{seed} {name}".encode()))
            whole = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
            whole.normal_(0, deviation, generator=generator)
            set_parameter(parameter, whole)

    def forward(
        self,
        tokens_T: Tensor,
        layout: PackedLayout,
        targets_T: Tensor | None = None,
        loss_rows_R: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Return the hidden states after the last norm or, with targets, the loss: the summed cross-entropy in nats.

        Args:
            tokens_T: int64.
            layout: segments of the packed sequence, on the device of the tokens.
            targets_T: int64, the token that each row predicts, -100 where the row carries no loss.
            loss_rows_R: int64, in 0..T-1, the rows that may carry loss, each once; padding repeats rows whose target is -100.
                No other row goes through the last norm and the output projection. None means all rows.
            backend: backend of `packed_attention`.

        Returns:
            [T, W], or a scalar in float32 (float64 for float64 weights).

        Raises:
            ValueError: shapes, dtypes or devices do not fit together; the backend is unknown or cannot run here.
        """
        x_TW = self.embed_tokens(tokens_T)
        for block in self.layers:
            x_TW = block(x_TW, layout, backend)
        if targets_T is None:
            return self.norm(x_TW)
        if loss_rows_R is not None:
            x_TW, targets_T = x_TW.index_select(0, loss_rows_R), targets_T.index_select(0, loss_rows_R)
        return linear_cross_entropy(self.norm(x_TW), self._output_weight, targets_T)

    def logits(self, hidden_TW: Tensor) -> Tensor:
        """Return the logits [T, V] of hidden states after the last norm."""
        return nn.functional.linear(hidden_TW, self._output_weight)

    @property
    def _output_weight(self) -> Tensor:
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.embed_tokens.weight.device


@torch.no_grad()
def set_parameter(parameter: nn.Parameter, whole: Tensor) -> None:
    """Copy a whole tensor, which every process has, into a parameter that may be sharded; without communication."""
    if isinstance(parameter, DTensor):
        whole = whole.to(parameter.device)
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(whole)
