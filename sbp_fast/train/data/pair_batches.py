"""Batches of pairs: each seed is read once for all partners packed with it, and only the partners carry loss."""

from __future__ import annotations

import numpy as np
from numba import njit

from sbp_fast.config import TrainConfig
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.errors import UserError
from sbp_fast.pairs.pairset import PairSet
from sbp_fast.train.data.batches import NO_TARGET, PackedBatch
from sbp_fast.train.data.order import Order, Source
from sbp_fast.train.data.packing import Packing

PAIRS = "pairs"


class PairBatches:
    """Batches of groups: a seed, a root segment without loss, and its partners, children that begin with the partner token.

    A group is packed whole. A seed is truncated to `context` tokens; a partner longer than that is left out and counted; a
    group larger than a packed sequence is split, its seed repeated.

    Attributes:
        pairs: number of (seed, partner) pairs that are learnt from.
        partners_too_long: number of pairs left out.
        epochs: times that the run reads all groups.

    Raises:
        UserError: packed sequences that do not hold a pair; no partner that fits.
    """

    def __init__(
        self, corpus: Corpus, pairs: PairSet, partner_token: int, recipe: TrainConfig, context: int, seed: int
    ) -> None:
        self.sequence_tokens, self.steps = recipe.microbatch_tokens, recipe.steps
        self.sequences_per_step = recipe.sequences_per_step
        if self.sequence_tokens < 2 * context:
            remedy = f"set it to at least twice model.context, {2 * context}"
            raise UserError("synthesizer.microbatch_tokens", f"{self.sequence_tokens} does not hold a pair", remedy)
        self.corpus, self.partner_token, self.context = corpus, partner_token, context
        lengths = np.diff(corpus.offsets)
        fits = lengths[pairs.partners] <= context
        seeds, self.partners = pairs.seeds[fits], pairs.partners[fits]
        self.pairs, self.partners_too_long = len(seeds), int((~fits).sum())
        if not self.pairs:
            remedy = "raise model.context, or split documents with corpus.passage_characters"
            raise UserError("pairs", f"no partner is within model.context = {context} tokens", remedy)
        self.starts, sizes = split_groups(seeds, self.partners, lengths, context, self.sequence_tokens)
        self.seeds = seeds[self.starts[:-1]]
        self.packing = Packing(sizes, self.sequence_tokens, seed)
        source = Source(PAIRS, self.packing.bins, repeats=True)
        self.order = Order([source], sequences_per_step=self.sequences_per_step, steps=self.steps, seed=seed)
        self.epochs = self.order.epochs[PAIRS]

    def sequence(self, step: int, index: int) -> PackedBatch:
        """Return packed sequence `index` of a step.

        Raises:
            ValueError: there is no such step or index.
        """
        if not (0 <= step < self.steps and 0 <= index < self.sequences_per_step):
            raise ValueError(f"sequence {index} of step {step}: there are {self.sequences_per_step} in each of {self.steps}")
        ref = self.order.at(step * self.sequences_per_step + index)
        tokens: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        parents: list[int] = []
        documents: list[int] = []
        for group in self.packing.items(ref.index, ref.epoch).tolist():
            seed, partners = int(self.seeds[group]), self.partners[self.starts[group] : self.starts[group + 1]].tolist()
            root = len(parents)
            tokens.append(self.corpus[seed][: self.context])
            targets.append(np.full(len(tokens[-1]), NO_TARGET))
            for partner in partners:
                document = self.corpus[partner].astype(np.int64)
                tokens.append(np.concatenate([[self.partner_token], document[1:]]))
                targets.append(np.append(document[1:], NO_TARGET))
            parents += [-1] + [root] * len(partners)
            documents += [seed, *partners]
        lengths = [len(segment) for segment in tokens]
        joined, joined_targets, length = np.concatenate(tokens), np.concatenate(targets), self.sequence_tokens
        return PackedBatch.build(joined, joined_targets, lengths, length=length, parents=parents, documents=documents)


@njit(cache=True)
def split_groups(seeds, partners, lengths, context, capacity):  # type: ignore[no-untyped-def]
    """Split pairs into groups with one seed that fit a packed sequence together.

    Args:
        seeds: int [pairs], sorted.
        partners: int [pairs].
        lengths: int [documents], their tokens.
        context: to which a seed is truncated.
        capacity: of a packed sequence; no pair alone exceeds it.

    Returns:
        Where each group starts, int64 [groups + 1], and its tokens, int64 [groups].
    """
    starts, sizes = np.empty(len(seeds) + 1, np.int64), np.empty(len(seeds), np.int64)
    groups = 0
    for pair in range(len(seeds)):
        size = lengths[partners[pair]]
        if pair == 0 or seeds[pair] != seeds[pair - 1] or sizes[groups - 1] + size > capacity:
            starts[groups], sizes[groups] = pair, min(lengths[seeds[pair]], context)
            groups += 1
        sizes[groups - 1] += size
    starts[groups] = len(seeds)
    return starts[: groups + 1], sizes[:groups]
