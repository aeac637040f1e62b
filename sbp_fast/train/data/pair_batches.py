"""Batches of pairs: each seed is read once for all partners packed with it, and only the partners carry loss."""

from __future__ import annotations

from dataclasses import dataclass

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
    """Batches of groups of pairs (see `PackedPairs`).

    Attributes:
        packed: the groups in packed sequences.
        epochs: times that the run reads all groups.

    Raises:
        UserError: packed sequences that do not hold a pair; no partner that fits.
    """

    def __init__(
        self, corpus: Corpus, pairs: PairSet, partner_token: int, recipe: TrainConfig, context: int, seed: int
    ) -> None:
        self.sequence_tokens, self.steps = recipe.microbatch_tokens, recipe.steps
        self.sequences_per_step = recipe.sequences_per_step
        self.packed = PackedPairs.pack(
            corpus, pairs.seeds, pairs.partners, partner_token, capacity=self.sequence_tokens, context=context, seed=seed
        )
        source = Source(PAIRS, self.packed.packing.bins, repeats=True)
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
        return self.packed.sequence(ref.index, ref.epoch, self.sequence_tokens)


@dataclass(frozen=True)
class PackedPairs:
    """Pairs in groups: a seed, a root segment without loss, and its partners, children that begin with the partner token.

    A group is packed whole. A seed is truncated to a context; a partner longer than that is left out and counted; a group
    larger than a packed sequence is split, its seed repeated.

    Attributes:
        corpus: the documents.
        partner_token: id of the token that begins a partner.
        context: tokens that a seed is truncated to.
        seeds: int64 [groups], the seed of each.
        partners: int64 [pairs] that are packed.
        starts: int64 [groups + 1], where each group starts in `partners`.
        packing: of the groups; a bin is a packed sequence.
        partners_too_long: number of pairs left out.
    """

    corpus: Corpus
    partner_token: int
    context: int
    seeds: np.ndarray
    partners: np.ndarray
    starts: np.ndarray
    packing: Packing
    partners_too_long: int

    @staticmethod
    def pack(
        corpus: Corpus,
        seeds: np.ndarray,
        partners: np.ndarray,
        partner_token: int,
        *,
        capacity: int,
        context: int,
        seed: int,
    ) -> PackedPairs:
        """Pack pairs into sequences of `capacity` tokens.

        Args:
            corpus: the documents.
            seeds: int64 [pairs], sorted.
            partners: int64 [pairs].
            partner_token: id of the token that begins a partner.
            capacity: tokens of a packed sequence.
            context: tokens of the model's context.
            seed: of the packing.

        Raises:
            UserError: packed sequences that do not hold a pair; no partner that fits.
        """
        if capacity < 2 * context:
            remedy = (
                f"set it to at least twice model.context, {2 * context}, or take a model with a shorter one (import --context)"
            )
            raise UserError("synthesizer.microbatch_tokens", f"{capacity} does not hold a pair", remedy)
        lengths = np.diff(corpus.offsets)
        fits = lengths[partners] <= context
        if not fits.any():
            remedy = "raise model.context, or split documents with corpus.passage_characters"
            raise UserError("pairs", f"no partner is within model.context = {context} tokens", remedy)
        seeds, partners = seeds[fits], partners[fits]
        starts, sizes = split_groups(seeds, partners, lengths, context, capacity)
        packing = Packing(sizes, capacity, seed)
        return PackedPairs(corpus, partner_token, context, seeds[starts[:-1]], partners, starts, packing, int((~fits).sum()))

    def sequence(self, index: int, epoch: int, length: int) -> PackedBatch:
        """Return packed sequence `index` of an epoch, padded to `length`."""
        tokens: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        parents: list[int] = []
        documents: list[int] = []
        for group in self.packing.items(index, epoch).tolist():
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
        joined, joined_targets = np.concatenate(tokens), np.concatenate(targets)
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
