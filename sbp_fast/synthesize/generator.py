"""Batched generation: one prefill a seed, its keys and values shared by all samples of that seed.

The queries of a seed's samples meet the seed's keys in one product and their own keys in another; one softmax goes over
both. Slot g * N + n is sample n of seed g; rows are the slots still live, in any order. A finished row leaves at once.

Tensor suffixes besides those of the model: B live rows, S tokens of the longest seed, R query heads for
each key/value head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from sbp_kernels import PackedLayout, packed_attention, sample_tokens
from torch import Tensor

from sbp_fast.model.transformer import Block, Transformer

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

    A layer's are [G, K, S, D] for the seeds and [rows, K, tokens, D] for the samples, of which the first B rows are live.
    """

    def __init__(self, model: Transformer, seeds: Sequence[np.ndarray], samples: int, maximum_tokens: int) -> None:
        self.model, self.samples = model, samples
        self.blocks = cast(list[Block], list(model.layers))
        config, lengths = model.config, [len(seed) for seed in seeds]
        kinds, width = (config.layers, 2), config.head_width
        self.seeds = torch.zeros(*kinds, len(seeds), config.key_value_heads, max(lengths), width, device=model.device)
        # the system gives memory to the rows' tokens as they come, not to what is never written
        rows = len(seeds) * samples
        self.own = torch.empty(*kinds, rows, config.key_value_heads, maximum_tokens, width, device=model.device)
        self.length = 0
        self.slots_B = torch.arange(rows, device=model.device)
        self.seed_lengths_G = torch.tensor(lengths, device=model.device)
        self.bias = self._bias()
        for first, last in _slabs(lengths):
            self._prefill(seeds[first:last], first)

    def _bias(self) -> Tensor:
        """What is added to the seeds' scores, -inf at their padding: [G * K, 1, S]."""
        padding_GS = torch.arange(self.seeds.shape[4], device=self.seeds.device) >= self.seed_lengths_G.unsqueeze(1)
        bias_GS = self.seeds.new_zeros(padding_GS.shape).masked_fill_(padding_GS, float("-inf"))
        return bias_GS.repeat_interleave(self.seeds.shape[3], 0).unsqueeze(1)

    def _prefill(self, seeds: Sequence[np.ndarray], first: int) -> None:
        lengths = [len(seed) for seed in seeds]
        layout = PackedLayout.from_lengths(lengths).to(self.model.device)
        tokens_T = torch.from_numpy(np.concatenate(seeds).astype(np.int64)).to(self.model.device)
        x_TW = self.model.embed_tokens(tokens_T)
        for layer, block in enumerate(self.blocks):
            q_THD, k_TKD, v_TKD = block.self_attn.project(block.input_layernorm(x_TW), layout.positions)
            for kind, x_TKD in enumerate((k_TKD, v_TKD)):
                for seed, x in enumerate(x_TKD.split(lengths), first):
                    self.seeds[layer, kind, seed, :, : len(x)] = x.transpose(0, 1)
            if layer + 1 < len(self.blocks):  # nothing reads the last layer's output
                x_TW = x_TW + block.self_attn.output(packed_attention(q_THD, k_TKD, v_TKD, layout))
                x_TW = x_TW + block.mlp(block.post_attention_layernorm(x_TW))

    def step(self, tokens_B: Tensor) -> Tensor:
        """Append one token to each live row; logits [B, V] of what comes next."""
        positions_B = self.seed_lengths_G[self.slots_B // self.samples] + self.length
        x_BW = self.model.embed_tokens(tokens_B)
        for layer, block in enumerate(self.blocks):
            q_BHD, k_BKD, v_BKD = block.self_attn.project(block.input_layernorm(x_BW), positions_B)
            x_BW = x_BW + block.self_attn.output(self._attend(layer, q_BHD, k_BKD, v_BKD))
            x_BW = x_BW + block.mlp(block.post_attention_layernorm(x_BW))
        self.length += 1
        return self.model.logits(self.model.norm(x_BW))

    def _attend(self, layer: int, q_BHD: Tensor, k_BKD: Tensor, v_BKD: Tensor) -> Tensor:
        rows, longest = len(q_BHD), self.seeds.shape[4]
        own_k, own_v = self.own[layer, :, :rows, :, : self.length + 1]
        own_k[:, :, -1], own_v[:, :, -1] = k_BKD, v_BKD
        seed_k, seed_v = (x.flatten(0, 1) for x in self.seeds[layer])
        q_BKRD = q_BHD.unflatten(1, (k_BKD.shape[1], -1)) * q_BHD.shape[2] ** -0.5
        seed_scores = torch.baddbmm(self.bias, self._by_seed(q_BKRD), seed_k.transpose(1, 2))
        own_scores = torch.bmm(q_BKRD.flatten(0, 1), own_k.flatten(0, 1).transpose(1, 2))
        scores = torch.cat([self._by_row(seed_scores), own_scores.view(*q_BKRD.shape[:3], -1)], -1)
        weights_BKRT = scores.softmax(-1)
        seed_out = self._by_row(torch.bmm(self._by_seed(weights_BKRT[..., :longest]), seed_v))
        own_weights = weights_BKRT[..., longest:].flatten(0, 1)
        return torch.baddbmm(seed_out.flatten(0, 1), own_weights, own_v.flatten(0, 1)).view_as(q_BHD)

    def _by_seed(self, x_BKRX: Tensor) -> Tensor:
        """[G * K, N * R, X]: the rows of a seed side by side, zeros where one is finished."""
        groups, heads = self.seeds.shape[2:4]
        slots = x_BKRX.new_zeros(groups * self.samples, *x_BKRX.shape[1:]).index_copy_(0, self.slots_B, x_BKRX)
        return slots.unflatten(0, (groups, -1)).transpose(1, 2).reshape(groups * heads, -1, x_BKRX.shape[3])

    def _by_row(self, x: Tensor) -> Tensor:
        """The inverse of `_by_seed`: [B, K, R, X]."""
        groups, heads = self.seeds.shape[2:4]
        slots = x.view(groups, heads, self.samples, -1, x.shape[2]).transpose(1, 2).flatten(0, 1)
        return slots.index_select(0, self.slots_B)

    def keep(self, live_B: Tensor) -> Tensor:
        """Forget the rows that are not live: the last live rows move into their places.

        Returns:
            The old index of each row that is left.
        """
        count = int(live_B.sum())
        order_B = torch.arange(count, device=live_B.device)
        holes, movers = (~live_B[:count]).nonzero().squeeze(1), live_B[count:].nonzero().squeeze(1) + count
        order_B[holes] = movers
        self.own[:, :, holes, :, : self.length] = self.own[:, :, movers, :, : self.length]
        self.slots_B = self.slots_B[order_B]
        self._forget_seeds()
        return order_B

    def _forget_seeds(self) -> None:
        """Drop the seeds without live rows once they are a quarter of all."""
        groups_B = self.slots_B // self.samples
        kept = groups_B.unique()
        if len(kept) == 0 or 4 * len(kept) > 3 * len(self.seed_lengths_G):
            return
        self.slots_B = torch.searchsorted(kept, groups_B) * self.samples + self.slots_B % self.samples
        self.seed_lengths_G = self.seed_lengths_G[kept]
        self.seeds = self.seeds[:, :, kept, :, : int(self.seed_lengths_G.max())]
        self.bias = self._bias()


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
    cache = SharedSeedCache(model, seeds, samples, rule.maximum_tokens)
    uniforms_RT = torch.from_numpy(uniforms).to(device)
    drawn_RT = torch.full(uniforms.shape, rule.end, device=device)
    rows_B = torch.arange(len(uniforms), device=device)
    tokens_B = torch.full_like(rows_B, rule.first)
    forbidden = torch.tensor(rule.forbidden, dtype=torch.int64, device=device)
    for step in range(rule.maximum_tokens):
        tokens_B, _ = sample_tokens(
            cache.step(tokens_B),
            uniforms_RT[rows_B, step],
            temperature=rule.temperature,
            top_p=rule.top_p,
            forbidden=forbidden,
        )
        drawn_RT[rows_B, step] = tokens_B
        live_B = tokens_B != rule.end
        drawn, live = len(rows_B), int(live_B.sum())
        if live < drawn:
            order_B = cache.keep(live_B)
            rows_B, tokens_B = rows_B[order_B], tokens_B[order_B]
        if progress:
            progress(drawn - live if step + 1 < rule.maximum_tokens else drawn, drawn)
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
