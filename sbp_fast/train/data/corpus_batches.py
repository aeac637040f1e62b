"""Batches of a real corpus, repeated as often as the token budget asks, and of a synthetic one, read at most once."""

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
    """Batches of documents, each of which attends to itself alone.

    Each token is an input exactly once an epoch, and a target once unless it begins a document: a document longer than the
    context is read in chunks, and the last token of a chunk still has its target.

    Args:
        real: the corpus that may repeat.
        synthetic: the corpus that may not; it gets `task.share` of the packed sequences, or as many as it has.
        task: the recipe, the seed and the share of synthetic text.
        context: tokens of the model's context.

    Attributes:
        packed: the packed documents of each source.
        synthetic_share: of the packed sequences.

    Raises:
        UserError: packed sequences shorter than the context; less synthetic text than the minimum asked for.
    """

    def __init__(self, real: Corpus, synthetic: Corpus | None, task: TrainTask, context: int) -> None:
        recipe, seed = task.recipe, task.seed
        self.sequence_tokens, self.steps = recipe.microbatch_tokens, recipe.steps
        self.sequences_per_step = recipe.sequences_per_step
        if self.sequence_tokens < context:
            problem = f"{self.sequence_tokens} is less than model.context = {context}"
            raise UserError("pretrain.microbatch_tokens", problem, "raise it to that or more")
        self.packed = {REAL: PackedDocuments.pack(real, self.sequence_tokens, context, seed)}
        sources = [Source(REAL, self.packed[REAL].packing.bins, repeats=True)]
        if synthetic is not None:
            self.packed[SYNTHETIC] = PackedDocuments.pack(synthetic, self.sequence_tokens, context, seed)
            available, total = self.packed[SYNTHETIC].packing.bins, self.steps * self.sequences_per_step
            share = Fraction(min(int(task.share * total), available), total)
            _require_enough(task, share, available, total)
            sources = [replace(sources[0], share=1 - share), Source(SYNTHETIC, available, repeats=False, share=share)]
        self.synthetic_share = float(1 - sources[0].share)
        self.order = Order(sources, sequences_per_step=self.sequences_per_step, steps=self.steps, seed=seed)

    def sequence(self, step: int, index: int) -> PackedBatch:
        """Return packed sequence `index` of a step.

        Raises:
            ValueError: there is no such step or index.
        """
        if not (0 <= step < self.steps and 0 <= index < self.sequences_per_step):
            raise ValueError(f"sequence {index} of step {step}: there are {self.sequences_per_step} in each of {self.steps}")
        ref = self.order.at(step * self.sequences_per_step + index)
        packed = self.packed[ref.source]
        return packed.sequence(ref.index, ref.epoch, self.sequence_tokens, synthetic=ref.source == SYNTHETIC)


@dataclass(frozen=True)
class PackedDocuments:
    """A corpus split into chunks of at most a context, and their packing into sequences.

    Attributes:
        corpus: the documents.
        documents: uint32 [chunks], the document of each chunk.
        starts: int64 [chunks], where each starts in the tokens of the corpus.
        lengths: int32 [chunks], its tokens.
        packing: of the chunks; a bin is a packed sequence.
    """

    corpus: Corpus
    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    packing: Packing

    @staticmethod
    def pack(corpus: Corpus, capacity: int, context: int, seed: int, *, selected: np.ndarray | None = None) -> PackedDocuments:
        """Split documents of a corpus, all or the selected ones, into chunks of a context and pack them into `capacity` tokens.

        Args:
            corpus: the documents.
            capacity: tokens of a packed sequence.
            context: most tokens of a chunk.
            seed: of the packing.
            selected: int64, indices of documents; None takes all.
        """
        documents = np.arange(len(corpus), dtype=np.uint32) if selected is None else selected.astype(np.uint32)
        chunks = -(-np.diff(corpus.offsets)[documents] // context)
        documents = np.repeat(documents, chunks)
        chunk_index = np.arange(len(documents)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
        starts = corpus.offsets[documents] + chunk_index * context
        lengths = np.minimum(corpus.offsets[documents + np.int64(1)] - starts, context).astype(np.int32)
        return PackedDocuments(corpus, documents, starts, lengths, Packing(lengths, capacity, seed))

    def sequence(self, index: int, epoch: int, length: int, *, synthetic: bool) -> PackedBatch:
        """Return packed sequence `index` of an epoch, padded to `length`.

        Documents are told apart by the corpus's offsets, never by end tokens, which a document may also hold inside.
        """
        items = self.packing.items(index, epoch)
        documents, starts, lengths = self.documents[items].tolist(), self.starts[items], self.lengths[items]
        stops = starts + lengths
        tokens = np.concatenate([self.corpus.slice(*chunk) for chunk in zip(starts.tolist(), stops.tolist(), strict=True)])
        targets = np.empty(len(tokens), np.int64)
        targets[:-1] = tokens[1:]
        targets[np.cumsum(lengths) - 1] = NO_TARGET
        for chunk in np.flatnonzero(stops != self.corpus.offsets[np.add(documents, 1)]):  # the document goes on
            targets[lengths[: chunk + 1].sum() - 1] = self.corpus.slice(stops[chunk], stops[chunk] + 1)[0]
        return PackedBatch.build(tokens, targets, lengths.tolist(), length=length, synthetic=synthetic, documents=documents)


def _require_enough(task: TrainTask, share: Fraction, available: int, total: int) -> None:
    least, size = task.minimum_share, task.recipe.microbatch_tokens
    if share < least:
        asked = f"asks for {round(least * total) * size:,} synthetic tokens, and there are {available * size:,}"
        remedy = "synthesize more, lower the share, or train on fewer tokens: no synthetic document is read twice"
        raise UserError(f"arms.{task.name}.minimum_share = {least}", asked, remedy)
