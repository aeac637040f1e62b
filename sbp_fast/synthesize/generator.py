"""Batched generation: one prefill a seed, its keys and values shared by all samples of that seed.

Rows are laid out as G seeds with N samples each; slot g * N + n is sample n of seed g. Queries of a seed's samples meet the
seed's keys in one product, and their own keys in another; one softmax goes over both. Finished rows leave the layers at
once, and seeds whose samples are all finished leave the cache whenever it grows.

Tensor suffixes besides those of the model: B live rows, S tokens of the longest seed, R query heads a key/value head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sbp_kernels import PackedLayout, packed_attention
from torch import Tensor

from sbp_fast.model.transformer import Transformer
from sbp_fast.synthesize.sampler import sample

GROWTH_TOKENS = 32
PREFILL_TOKENS = 4096


@dataclass(frozen=True)
class SamplingRule:
    """How documents are drawn and where they stop.

    Attributes:
        end: token id that finishes a document.
        first: token id that begins one, after its seed.
        forbidden: token ids that are never drawn.
        maximum_tokens: a document without `end` after this many tokens is cut off there.
    """

    first: int
    end: int
    forbidden: tuple[int, ...]
    maximum_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


class SharedSeedCache:
    """Keys and values of G seeds, and of the tokens drawn after each by its N samples.

    Keys and values of a layer are [K, G, S, D] for the seeds and [K, G * N, tokens, D] for the samples: with the heads
    first, both kinds of scores are views of one shape.
    """

    def __init__(self, model: Transformer, seeds: Sequence[np.ndarray], samples: int) -> None:
        self.model, self.samples = model, samples
        config, device = model.config, model.device
        lengths = [len(seed) for seed in seeds]
        self.seed_lengths_G = torch.tensor(lengths, device=device)
        shape = (config.layers, 2, config.key_value_heads)
        self.seeds = torch.zeros(*shape, len(seeds), max(lengths), config.head_width, device=device)
        self.own = torch.zeros(*shape, len(seeds) * samples, GROWTH_TOKENS, config.head_width, device=device)
        self.length = 0
        self.bias = self._bias()
        self.rotations = model.rotation(torch.arange(max(lengths) + 2 * config.context, device=device))
        for first, last in _slabs(lengths):
            self._prefill(seeds[first:last], first)

    def _bias(self) -> Tensor:
        """What is added to the seeds' scores, -inf at their padding: [K * G, 1, S]."""
        heads, groups, longest = self.seeds.shape[2:5]
        padding_GS = torch.arange(longest, device=self.seeds.device) >= self.seed_lengths_G.unsqueeze(1)
        bias_GS = self.seeds.new_zeros(groups, longest).masked_fill_(padding_GS, float("-inf"))
        return bias_GS.repeat(heads, 1).unsqueeze(1)

    def _prefill(self, seeds: Sequence[np.ndarray], first: int) -> None:
        lengths = [len(seed) for seed in seeds]
        layout = PackedLayout.from_lengths(lengths).to(self.model.device)
        tokens_T = torch.from_numpy(np.concatenate(seeds).astype(np.int64)).to(self.model.device)
        rotation = self.model.rotation(layout.positions)
        x_TW = self.model.embed_tokens(tokens_T)
        for layer, block in enumerate(self.model.layers):
            q_THD, k_TKD, v_TKD = block.self_attn.project(block.input_layernorm(x_TW), rotation)
            for kind, x_TKD in enumerate((k_TKD, v_TKD)):
                for seed, x in enumerate(x_TKD.split(lengths), first):
                    self.seeds[layer, kind, :, seed, : len(x)] = x.transpose(0, 1)
            if layer + 1 < len(self.model.layers):
                x_TW = x_TW + block.self_attn.output(packed_attention(q_THD, k_TKD, v_TKD, layout))
                x_TW = x_TW + block.mlp(block.post_attention_layernorm(x_TW))

    def step(self, tokens_B: Tensor, slots_B: Tensor) -> Tensor:
        """Append one token to each of the given slots; logits [B, V] of what comes next."""
        positions_B = self.seed_lengths_G[slots_B // self.samples] + self.length
        rotation = (self.rotations[0][positions_B], self.rotations[1][positions_B])
        x_BW = self.model.embed_tokens(tokens_B)
        for layer, block in enumerate(self.model.layers):
            q_BHD, k_BKD, v_BKD = block.self_attn.project(block.input_layernorm(x_BW), rotation)
            x_BW = x_BW + block.self_attn.output(self._attend(layer, slots_B, q_BHD, k_BKD, v_BKD))
            x_BW = x_BW + block.mlp(block.post_attention_layernorm(x_BW))
        self.length += 1
        return self.model.logits(self.model.norm(x_BW))

    def _attend(self, layer: int, slots_B: Tensor, q_BHD: Tensor, k_BKD: Tensor, v_BKD: Tensor) -> Tensor:
        heads, groups, longest, width = self.seeds.shape[2:]
        slots, repeats = groups * self.samples, q_BHD.shape[1] // heads
        (seed_k, seed_v), (own_k, own_v) = self.seeds[layer], self.own[layer]
        own_k[:, :, self.length].index_copy_(1, slots_B, k_BKD.transpose(0, 1))
        own_v[:, :, self.length].index_copy_(1, slots_B, v_BKD.transpose(0, 1))
        own_k, own_v = (x.flatten(0, 1)[:, : self.length + 1] for x in (own_k, own_v))
        # empty slots keep their place, so that a seed's samples stay together in one product
        q = q_BHD.new_zeros(heads, slots, repeats, width)
        q.index_copy_(1, slots_B, q_BHD.unflatten(1, (heads, repeats)).transpose(0, 1) * width**-0.5)
        seed_scores = torch.baddbmm(self.bias, q.view(heads * groups, -1, width), seed_k.flatten(0, 1).transpose(1, 2))
        own_scores = torch.bmm(q.flatten(0, 1), own_k.transpose(1, 2))
        weights = torch.cat([seed_scores.view(heads * slots, repeats, longest), own_scores], -1).softmax(-1)
        seed_out = torch.bmm(weights.view(heads * groups, -1, weights.shape[-1])[..., :longest], seed_v.flatten(0, 1))
        out = torch.baddbmm(seed_out.view(heads * slots, repeats, width), weights[..., longest:], own_v)
        return out.view(heads, slots, repeats, width).index_select(1, slots_B).transpose(0, 1).flatten(1, 2)

    @property
    def full(self) -> bool:
        """Whether `grow` must come before the next `step`."""
        return self.length == self.own.shape[4]

    def grow(self, slots_B: Tensor) -> Tensor:
        """Make room for more tokens and forget the seeds that have no live slot; returns the live slots' new numbers [B]."""
        groups_B = slots_B // self.samples
        kept = groups_B.unique()
        renumbered_B = torch.searchsorted(kept, groups_B) * self.samples + slots_B % self.samples
        if len(kept) < len(self.seed_lengths_G):
            self.seed_lengths_G = self.seed_lengths_G[kept]
            self.seeds = self.seeds[:, :, :, kept, : int(self.seed_lengths_G.max())].contiguous()
            self.bias = self._bias()
        old = self.own.unflatten(3, (-1, self.samples))
        shape = (*old.shape[:3], len(kept), self.samples, old.shape[5] + GROWTH_TOKENS, old.shape[6])
        grown = old.new_zeros(shape)
        grown[..., : old.shape[5], :] = old[:, :, :, kept]
        self.own = grown.flatten(3, 4)
        return renumbered_B


@dataclass(frozen=True)
class Draft:
    """A drawn document: its tokens without `first` and `end`, and whether it came to its end."""

    tokens: np.ndarray
    finished: bool


@torch.inference_mode()
def generate(
    model: Transformer,
    seeds: Sequence[np.ndarray],
    samples: int,
    uniforms: np.ndarray,
    rule: SamplingRule,
    progress: Callable[[int, int], None] | None = None,
) -> list[Draft]:
    """Draw `samples` documents for each seed, all together.

    Args:
        seeds: G arrays of token ids, each at least one token; of like lengths, for the least padding.
        uniforms: float64 [G * samples, rule.maximum_tokens] in [0, 1); row g * samples + n drives sample n of seed g.
        progress: called with the documents that ended and the tokens drawn at each step.

    Returns:
        G * samples drafts in the order of the rows of `uniforms`.
    """
    device = model.device
    cache = SharedSeedCache(model, seeds, samples)
    uniforms_RT = torch.from_numpy(uniforms).to(device)
    drawn_RT = torch.full(uniforms.shape, rule.end, device=device)
    rows_B = slots_B = torch.arange(len(uniforms), device=device)
    tokens_B = torch.full_like(rows_B, rule.first)
    forbidden = torch.tensor(rule.forbidden, dtype=torch.int64, device=device)
    for step in range(rule.maximum_tokens):
        if cache.full:
            slots_B = cache.grow(slots_B)
        logits_BV = cache.step(tokens_B, slots_B).index_fill_(1, forbidden, float("-inf"))
        tokens_B = drawn_RT[rows_B, step] = sample(logits_BV, uniforms_RT[rows_B, step], rule.temperature, rule.top_p)
        live_B = tokens_B != rule.end
        drawn, live = len(rows_B), int(live_B.sum())
        if live < drawn:
            rows_B, slots_B, tokens_B = rows_B[live_B], slots_B[live_B], tokens_B[live_B]
        if progress:
            progress(drawn - live, drawn)
        if not live:
            break
    finished_R = (drawn_RT == rule.end).any(1).cpu()
    lengths_R = (drawn_RT != rule.end).sum(1).cpu()
    return [
        Draft(tokens[:length].numpy(), bool(finished))
        for tokens, length, finished in zip(drawn_RT.cpu(), lengths_R, finished_R, strict=True)
    ]


def _slabs(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive seeds of some PREFILL_TOKENS tokens together, at least one seed each."""
    first, held = 0, 0
    for seed, length in enumerate(lengths):
        if held and held + length > PREFILL_TOKENS:
            yield first, seed
            first, held = seed, 0
        held += length
    yield first, len(lengths)
