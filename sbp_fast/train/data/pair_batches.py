"""Seeds with their partners: each seed is read once for all partners that stand with it, and only they carry loss."""

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

    Groups stand whole in a stream. A seed is cut to `context` tokens; a partner longer than that is left out and counted; a
    group larger than a stream is split, its seed repeated.

    Attributes:
        pairs: (seed, partner) pairs that can be learnt from.
        partners_too_long: pairs left out.
        epochs: how often the run reads all groups.

    Raises:
        UserError: streams that do not hold a pair; no partner that fits.
    """

    def __init__(
        self, corpus: Corpus, pairs: PairSet, partner_token: int, recipe: TrainConfig, context: int, seed: int
    ) -> None:
        self.stream_tokens, self.streams_per_step, self.steps = (
            recipe.microbatch_tokens,
            recipe.sequences_per_step,
            recipe.steps,
        )
        if self.stream_tokens < 2 * context:
            remedy = f"set it to at least twice model.context, {2 * context}"
            raise UserError("synthesizer.microbatch_tokens", f"{self.stream_tokens} does not hold a pair", remedy)
        self.corpus, self.partner_token, self.context = corpus, partner_token, context
        lengths = np.diff(corpus.offsets)
        fits = lengths[pairs.partners] <= context
        seeds, self.partners = pairs.seeds[fits], pairs.partners[fits]
        self.pairs, self.partners_too_long = len(seeds), int((~fits).sum())
        if not self.pairs:
            remedy = "raise model.context, or cut documents with corpus.passage_characters"
            raise UserError("pairs", f"no partner is within model.context = {context} tokens", remedy)
        self.starts, sizes = cut_groups(seeds, self.partners, lengths, context, self.stream_tokens)
        self.seeds = seeds[self.starts[:-1]]
        self.packing = Packing(sizes, self.stream_tokens, seed)
        source = Source(PAIRS, self.packing.bins, repeats=True)
        self.order = Order([source], streams_per_step=self.streams_per_step, steps=self.steps, seed=seed)
        self.epochs = self.order.epochs[PAIRS]

    def stream(self, step: int, number: int) -> PackedBatch:
        if not (0 <= step < self.steps and 0 <= number < self.streams_per_step):
            raise ValueError(f"stream {number} of step {step}: there are {self.streams_per_step} in each of {self.steps}")
        drawn = self.order.draw(step * self.streams_per_step + number)
        tokens: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        parents: list[int] = []
        documents: list[int] = []
        for group in self.packing.items(drawn.stream, drawn.epoch).tolist():
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
        whole, goals = np.concatenate(tokens), np.concatenate(targets)
        return PackedBatch.build(whole, goals, lengths, length=self.stream_tokens, parents=parents, documents=documents)


@njit(cache=True)
def cut_groups(seeds, partners, lengths, context, capacity):  # type: ignore[no-untyped-def]
    """Runs of pairs with one seed that fit a stream together: where each starts, int64 [groups + 1], and its tokens [groups].

    Pairs stand by seed; no pair alone exceeds `capacity`.
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
