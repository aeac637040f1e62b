"""Whole documents of the real corpus, repeated as often as the budget asks, and of a synthetic one, each read at most once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.errors import UserError
from sbp_fast.train.data.batches import NO_TARGET, REAL, SYNTHETIC, PackedBatch
from sbp_fast.train.data.order import Order, Source
from sbp_fast.train.data.packing import Packing
from sbp_fast.train.task import TrainTask


class CorpusBatches:
    """Batches of documents that see themselves alone.

    Each token is an input exactly once an epoch, and a target once unless it begins a document: a document longer than the
    context is read in pieces, and the last token of a piece still has its target.

    Args:
        real: what may repeat.
        synthetic: what may not; it gets `task.share` of the streams, or as many as it has.
        task: the recipe, the seed and the share of synthetic text.
        context: tokens of the model's context.

    Attributes:
        packed: the packed documents of each source.
        synthetic_share: of the streams.

    Raises:
        UserError: streams that do not hold a context; less synthetic text than the least asked for.
    """

    def __init__(self, real: Corpus, synthetic: Corpus | None, task: TrainTask, context: int) -> None:
        recipe, seed = task.recipe, task.seed
        self.stream_tokens, self.streams_per_step = recipe.microbatch_tokens, recipe.sequences_per_step
        self.steps = recipe.steps
        if self.stream_tokens < context:
            found = f"{self.stream_tokens} is less than model.context = {context}"
            raise UserError("pretrain.microbatch_tokens", found, "raise it to that or more")
        self.packed = {REAL: PackedDocuments.pack(real, self.stream_tokens, context, seed)}
        sources = [Source(REAL, self.packed[REAL].packing.bins, repeats=True)]
        if synthetic is not None:
            self.packed[SYNTHETIC] = PackedDocuments.pack(synthetic, self.stream_tokens, context, seed)
            available, total = self.packed[SYNTHETIC].packing.bins, self.steps * self.streams_per_step
            share = Fraction(min(int(task.share * total), available), total)
            _require_enough(task, share, available, total)
            sources = [replace(sources[0], share=1 - share), Source(SYNTHETIC, available, repeats=False, share=share)]
        self.synthetic_share = float(1 - sources[0].share)
        self.order = Order(sources, streams_per_step=self.streams_per_step, steps=self.steps, seed=seed)

    def stream(self, step: int, number: int) -> PackedBatch:
        if not (0 <= step < self.steps and 0 <= number < self.streams_per_step):
            raise ValueError(f"stream {number} of step {step}: there are {self.streams_per_step} in each of {self.steps}")
        drawn = self.order.draw(step * self.streams_per_step + number)
        packed = self.packed[drawn.source]
        return packed.stream(drawn.stream, drawn.epoch, self.stream_tokens, synthetic=drawn.source == SYNTHETIC)


@dataclass(frozen=True)
class PackedDocuments:
    """A corpus cut into pieces of at most a context, and the streams in which they stand.

    Attributes:
        documents, starts, lengths: of each piece its document, where it starts in the corpus, and its tokens.
    """

    corpus: Corpus
    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    packing: Packing

    @staticmethod
    def pack(corpus: Corpus, capacity: int, context: int, seed: int) -> PackedDocuments:
        sizes = np.diff(corpus.offsets)
        pieces = -(-sizes // context)
        documents = np.repeat(np.arange(len(sizes), dtype=np.uint32), pieces)
        within = np.arange(len(documents)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        starts = corpus.offsets[documents] + within * context
        lengths = np.minimum(corpus.offsets[documents + np.int64(1)] - starts, context).astype(np.int32)
        return PackedDocuments(corpus, documents, starts, lengths, Packing(lengths, capacity, seed))

    def stream(self, number: int, epoch: int, length: int, *, synthetic: bool) -> PackedBatch:
        """Stream `number` of an epoch. Documents are told apart by the corpus's offsets, never by looking for end tokens,
        which a document's text may hold too."""
        items = self.packing.items(number, epoch)
        documents, starts, lengths = self.documents[items].tolist(), self.starts[items], self.lengths[items]
        stops = starts + lengths
        tokens = np.concatenate([self.corpus.slice(*piece) for piece in zip(starts.tolist(), stops.tolist(), strict=True)])
        targets = np.empty(len(tokens), np.int64)
        targets[:-1] = tokens[1:]
        targets[np.cumsum(lengths) - 1] = NO_TARGET
        for piece in np.flatnonzero(stops != self.corpus.offsets[np.add(documents, 1)]):  # the document goes on
            targets[lengths[: piece + 1].sum() - 1] = self.corpus.slice(stops[piece], stops[piece] + 1)[0]
        return PackedBatch.build(tokens, targets, lengths.tolist(), length=length, synthetic=synthetic, documents=documents)


def _require_enough(task: TrainTask, share: Fraction, available: int, total: int) -> None:
    least, size = task.minimum_share, task.recipe.microbatch_tokens
    if share < least:
        asked = f"asks for {round(least * total) * size:,} synthetic tokens, and there are {available * size:,}"
        remedy = "synthesize more, lower the share, or train on fewer tokens: no synthetic document is read twice"
        raise UserError(f"arms.{task.name}.minimum_share = {least}", asked, remedy)
