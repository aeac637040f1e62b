"""What a training step reads: one packed stream of tokens, their targets and the layout of their segments.

A batch is a pure function of its step. Streams have no padding, so their lengths differ a little; a version with fixed
shapes (CUDA graphs) would pad each to the step's budget by one last segment without loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from sbp_kernels import PackedLayout
from torch import Tensor

from sbp_fast.config import RunConfig, TrainConfig
from sbp_fast.corpus.order import Order, Source
from sbp_fast.corpus.shards import Corpus
from sbp_fast.errors import UserError
from sbp_fast.pairs.pairset import PairSet

NO_TARGET = -100
REAL, SYNTHETIC = "real", "synthetic"


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One step's input.

    Attributes:
        tokens: int64 [T].
        targets: int64 [T], the next token of the same document, -100 where there is none or it carries no loss.
        layout: segments of the stream.
        real_tokens, synthetic_tokens: how the T tokens divide.
        loss_tokens: targets that are not -100.
    """

    tokens: Tensor
    targets: Tensor
    layout: PackedLayout
    real_tokens: int
    synthetic_tokens: int
    loss_tokens: int

    @staticmethod
    def build(tokens: np.ndarray, targets: np.ndarray, layout: PackedLayout, *, synthetic_tokens: int = 0) -> PackedBatch:
        return PackedBatch(
            torch.from_numpy(tokens.astype(np.int64)),
            torch.from_numpy(targets.astype(np.int64)),
            layout,
            len(tokens) - synthetic_tokens,
            synthetic_tokens,
            int((targets != NO_TARGET).sum()),
        )

    def to(self, device: torch.device | str) -> PackedBatch:
        return replace(self, tokens=self.tokens.to(device), targets=self.targets.to(device), layout=self.layout.to(device))


class Batches(Protocol):
    """The batches of one training run: `steps` of them, about `tokens` tokens together."""

    steps: int
    tokens: int

    def batch(self, step: int) -> PackedBatch:
        """The batch of `step`, a pure function of it."""


class CorpusBatches:
    """Windows of the real corpus, repeated as often as the budget asks, and of a synthetic one, each read at most once.

    Windows end where they end: a document that goes on in the next window is learnt in two parts, and the last token of
    the first part still has its target. So each token is an input once an epoch, and a target once unless it begins a
    document. The last window of a corpus is short, hence runs of equal steps may differ by less than a window of tokens
    for each epoch. A real corpus smaller than a window is read in windows of its own size.

    Args:
        real: what may repeat.
        synthetic: what may not; it gets `joint.maximum_synthetic_share` of the windows, or as many as it has.

    Attributes:
        synthetic_share: of the windows.
    """

    def __init__(self, real: Corpus, synthetic: Corpus | None, config: RunConfig) -> None:
        recipe = config.pretrain
        if recipe.tokens_per_step % recipe.window:
            found = f"{recipe.tokens_per_step} is no multiple of pretrain.window = {recipe.window}"
            raise UserError("pretrain.tokens_per_step", found, "make it one")
        window = min(recipe.window, real.tokens)
        self.steps = max(1, round(recipe.tokens / recipe.tokens_per_step))
        self.tokens, self.context = self.steps * recipe.tokens_per_step, config.model.context
        self.corpora = {REAL: real}
        sources = [Source(REAL, real.tokens, repeats=True)]
        total = self.steps * (recipe.tokens_per_step // window)
        if synthetic is not None:
            available = Source(SYNTHETIC, synthetic.tokens, repeats=False).windows(window)
            share = Fraction(min(int(config.joint.maximum_synthetic_share * total), available), total)
            self.corpora[SYNTHETIC] = synthetic
            sources = [replace(sources[0], share=1 - share), Source(SYNTHETIC, synthetic.tokens, repeats=False, share=share)]
        self.synthetic_share = float(1 - sources[0].share)
        self.order = Order(
            sources, window=window, windows_per_step=recipe.tokens_per_step // window, steps=self.steps, seed=config.seed
        )

    def batch(self, step: int) -> PackedBatch:
        windows = self.order.windows(step)
        parts = [cut_window(self.corpora[part.source], part.start, part.stop, self.context) for part in windows]
        tokens, targets, lengths = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        synthetic = sum(part.stop - part.start for part in windows if part.source == SYNTHETIC)
        return PackedBatch.build(tokens, targets, PackedLayout.from_lengths(lengths.tolist()), synthetic_tokens=synthetic)


def cut_window(corpus: Corpus, start: int, stop: int, context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [start, stop) of the stream, their targets, and the lengths of their segments.

    A segment ends with its document, and after `context` tokens. Documents are told apart by the corpus's offsets, never
    by looking for end tokens, which a document's text may hold too.
    """
    tokens = corpus.slice(start, min(stop + 1, corpus.tokens)).astype(np.int64)
    targets = np.full(stop - start, NO_TARGET)
    targets[: len(tokens) - 1] = tokens[1:]
    first, last = np.searchsorted(corpus.offsets, (start, stop), "right")
    ends = corpus.offsets[first:last] - start  # of the documents that end within the window
    targets[ends - 1] = NO_TARGET
    edges = np.unique(np.concatenate([[0], ends, [stop - start]]))
    pieces = [np.arange(low, high, context) for low, high in pairwise(edges)]
    return tokens[: stop - start], targets, np.diff(np.concatenate([*pieces, edges[-1:]]))


class PairBatches:
    """Seeds with their partners: each seed is read once for all partners that stand with it, and only they carry loss.

    A group is a seed, a root segment without loss, and its partners, children that begin with the partner token. Groups
    stand whole in a stream, filled in a shuffled order until the next one does not fit (next-fit). A seed is cut to
    `context` tokens; a partner longer than that is left out and counted; a group larger than a stream is split, its seed
    repeated.

    Attributes:
        pairs: (seed, partner) pairs that can be learnt from.
        partners_too_long: pairs left out.
        epochs: how often the run reads all groups.
    """

    def __init__(
        self, corpus: Corpus, pairs: PairSet, partner_token: int, recipe: TrainConfig, context: int, seed: int
    ) -> None:
        if recipe.tokens_per_step < 2 * context:
            remedy = f"set it to at least twice model.context, {2 * context}"
            raise UserError("synthesizer.tokens_per_step", f"{recipe.tokens_per_step} does not hold a pair", remedy)
        self.corpus, self.partner_token, self.context = corpus, partner_token, context
        self.groups, self.partners_too_long = plan_groups(corpus, pairs, context, recipe.tokens_per_step)
        if not self.groups:
            remedy = "raise model.context, or cut documents with corpus.passage_characters"
            raise UserError("pairs", f"no partner is within model.context = {context} tokens", remedy)
        self.pairs = sum(len(partners) for _, partners in self.groups)
        lengths = np.diff(corpus.offsets)
        sizes = np.array([min(lengths[seed], context) + lengths[partners].sum() for seed, partners in self.groups])
        self.streams = pack_groups(sizes, recipe.tokens_per_step, recipe.tokens, seed)
        self.steps = len(self.streams)
        self.tokens = int(sum(sizes[stream].sum() for stream in self.streams))
        self.epochs = self.tokens / int(sizes.sum())

    def batch(self, step: int) -> PackedBatch:
        tokens: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        parents: list[int] = []
        for group in self.streams[step]:
            seed, partners = self.groups[group]
            root = len(parents)
            tokens.append(self.corpus[seed][: self.context].astype(np.int64))
            targets.append(np.full(len(tokens[-1]), NO_TARGET))
            for partner in partners:
                document = self.corpus[int(partner)].astype(np.int64)
                tokens.append(np.concatenate([[self.partner_token], document[1:]]))
                targets.append(np.concatenate([document[1:], [NO_TARGET]]))
            parents += [-1] + [root] * len(partners)
        layout = PackedLayout.from_tree([len(segment) for segment in tokens], parents)
        return PackedBatch.build(np.concatenate(tokens), np.concatenate(targets), layout)


def plan_groups(corpus: Corpus, pairs: PairSet, context: int, capacity: int) -> tuple[list[tuple[int, np.ndarray]], int]:
    """(seed, partners) groups of at most `capacity` tokens each, and how many partners were too long for `context`."""
    lengths = np.diff(corpus.offsets)
    groups: list[tuple[int, np.ndarray]] = []
    too_long = 0
    for seed, partners in pairs.groups():
        fitting = partners[lengths[partners] <= context]
        too_long += len(partners) - len(fitting)
        room = capacity - min(int(lengths[seed]), context)
        groups += [(int(seed), fitting[part]) for part in next_fit(lengths[fitting], room)]
    return groups, too_long


def pack_groups(sizes: np.ndarray, capacity: int, tokens: int, seed: int) -> list[np.ndarray]:
    """Indices of the groups in each stream of at most `capacity` tokens, for as many streams as it takes to read `tokens`.

    Every epoch has its own shuffled order; a stream may hold the end of one epoch and the beginning of the next.
    """
    epochs = -(-(tokens + capacity) // int(sizes.sum())) + 1
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(len(sizes)) for epoch in range(epochs)])
    streams: list[np.ndarray] = []
    read = 0
    for part in next_fit(sizes[order], capacity):
        streams.append(order[part])
        read += int(sizes[order[part]].sum())
        if read >= tokens:
            break
    return streams


def next_fit(sizes: np.ndarray, capacity: int) -> Iterator[slice]:
    """Slices of consecutive items, each as long as its sum stays within `capacity`; no item may exceed it."""
    ends = np.cumsum(sizes)
    start, before = 0, 0
    while start < len(sizes):
        stop = int(np.searchsorted(ends, before + capacity, "right"))
        yield slice(start, stop)
        start, before = stop, int(ends[stop - 1])
