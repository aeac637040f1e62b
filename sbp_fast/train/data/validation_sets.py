"""Packed sequences on which a held-out loss is measured during training: validation documents, or pairs of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.train.data.batches import PackedBatch
from sbp_fast.train.data.corpus_batches import PackedDocuments
from sbp_fast.train.data.pair_batches import PackedPairs

PACKING_SEED = 0  # how the texts are packed changes their loss by rounding alone


@dataclass(frozen=True)
class ValidationSet:
    """Packed sequences whose targets are measured.

    Attributes:
        sequences: the packed sequences, all of one length.
        text_bytes: UTF-8 bytes of the texts that are predicted.
    """

    sequences: Sequence[PackedBatch]
    text_bytes: int

    @property
    def tokens(self) -> int:
        """Number of tokens, without padding."""
        return sum(sequence.counts.real_tokens for sequence in self.sequences)

    @property
    def loss_tokens(self) -> int:
        """Number of tokens that have a target."""
        return sum(sequence.counts.loss_tokens for sequence in self.sequences)


def document_set(corpus: Corpus, documents: np.ndarray, *, limit: int, capacity: int, context: int) -> ValidationSet:
    """Return the first of the documents, at most `limit` tokens of them but at least one document.

    Args:
        corpus: the held-out documents, in a shuffled order.
        documents: int64, indices of the documents to choose from.
        limit: most tokens.
        capacity: tokens of a packed sequence.
        context: tokens of the model's context; a longer document is read in chunks.
    """
    documents = documents[: _count_within(np.diff(corpus.offsets)[documents], limit)]
    packed = PackedDocuments.pack(corpus, capacity, context, PACKING_SEED, selected=documents)
    sequences = [packed.sequence(index, 0, capacity, synthetic=False) for index in range(packed.packing.bins)]
    return ValidationSet(sequences, int(corpus.text_bytes[documents].sum()))


def pair_set(
    corpus: Corpus,
    seeds: np.ndarray,
    partners: np.ndarray,
    partner_token: int,
    *,
    limit: int,
    capacity: int,
    context: int,
) -> ValidationSet | None:
    """Return the first of the pairs by seed, at most `limit` tokens of them but at least one pair; None if no partner fits.

    Only the partners are predicted, each after its seed (see `PackedPairs`).

    Args:
        corpus: the documents.
        seeds: int64 [pairs], indices into the corpus.
        partners: int64 [pairs], indices into the corpus.
        partner_token: id of the token that begins a partner.
        limit: most tokens.
        capacity: tokens of a packed sequence.
        context: tokens of the model's context.
    """
    lengths = np.diff(corpus.offsets)
    fits = lengths[partners] <= context
    order = np.argsort(seeds[fits], kind="stable")
    seeds, partners = seeds[fits][order], partners[fits][order]
    if not len(seeds):
        return None
    is_first = np.diff(seeds, prepend=-1) != 0  # a seed is read once for its partners
    count = _count_within(lengths[partners] + is_first * np.minimum(lengths[seeds], context), limit)
    seeds, partners = seeds[:count], partners[:count]
    packed = PackedPairs.pack(corpus, seeds, partners, partner_token, capacity=capacity, context=context, seed=PACKING_SEED)
    sequences = [packed.sequence(index, 0, capacity) for index in range(packed.packing.bins)]
    return ValidationSet(sequences, int(corpus.text_bytes[partners].sum()))


def _count_within(sizes: np.ndarray, limit: int) -> int:
    """Return how many of the first items have at most `limit` tokens together, at least one."""
    return max(1, int(np.searchsorted(np.cumsum(sizes), limit, side="right")))
