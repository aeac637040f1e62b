"""The documents that quality is measured on, and how much of them occurs elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sbp_fast.config import RunConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.dedup.seed_overlap import compare_with_seeds
from sbp_fast.dedup.shingle_index import Batch
from sbp_fast.evaluate.novelty import NOVEL_TOKENS, batch_of, known_counts, known_share, novel_rates
from sbp_fast.evaluate.quality import same_letters


@dataclass(frozen=True)
class Samples:
    """The documents that are measured; token arrays include <begin> and <end>.

    Attributes:
        written: all synthetic documents before the filters.
        filtered: all filtered documents.
        measured: int64, sorted indices of the measured documents of `written`.
        generated: tokens of these.
        passed: tokens of the measured documents of `filtered`.
        heldout: tokens of held-out documents.
        unique: tokens of unique documents, as many as `passed` where there are so many.
    """

    written: Corpus
    filtered: Corpus
    measured: np.ndarray
    generated: list[np.ndarray]
    passed: list[np.ndarray]
    heldout: list[np.ndarray]
    unique: list[np.ndarray]

    @staticmethod
    def sample(config: RunConfig, prepared: PreparedCorpus, written: Corpus, filtered: Corpus) -> Samples:
        """Return at most `quality.measured_documents` of each kind; the same seed gives the same documents."""
        count, generator = config.quality.measured_documents, np.random.default_rng(config.seed)
        corpora = (written, filtered, prepared.heldout)
        measured, passed, heldout = (np.sort(generator.permutation(len(corpus))[:count]) for corpus in corpora)
        return Samples(
            written,
            filtered,
            measured,
            [written[document] for document in measured.tolist()],
            [filtered[document] for document in passed.tolist()],
            [prepared.heldout[document] for document in heldout.tolist()],
            [prepared.unique[document] for document in range(min(len(passed), len(prepared.unique)))],
        )


@dataclass(frozen=True)
class Copied:
    """How much of the generated documents occurs elsewhere.

    Attributes:
        repeated: float64 [generated], share of repeated shingles (see `compare_with_seeds`).
        in_seed: float64 [generated], share of shingles that the seed has (see `compare_with_seeds`).
        letters: bool [generated], whether a document equals its seed except for white space and punctuation.
        in_corpus: float64 [generated], share of shingles that any unique document has.
        heldout_in_corpus: float64 [heldout], the same of held-out documents.
        novel: see `novel_rates`.
    """

    repeated: np.ndarray
    in_seed: np.ndarray
    letters: np.ndarray
    in_corpus: np.ndarray
    heldout_in_corpus: np.ndarray
    novel: list[dict[str, Any]]


def measure_copying(config: RunConfig, prepared: PreparedCorpus, samples: Samples) -> Copied:
    """Return how much of the sampled documents occurs in their seeds and in the unique documents."""
    width, seeds = config.filter.shingle_tokens, samples.written.column("seed")[samples.measured]
    groups: list[Batch] = [batch_of(documents) for documents in (samples.generated, samples.passed, samples.heldout)]
    known = {tokens: known_counts(groups, prepared.unique, tokens) for tokens in sorted({*NOVEL_TOKENS, width})}
    repeated, in_seed = compare_with_seeds(prepared, seeds, *groups[0], width)
    return Copied(
        repeated=repeated,
        in_seed=in_seed,
        letters=same_letters(prepared, samples.written, samples.measured),
        in_corpus=known_share(known[width][0]),
        heldout_in_corpus=known_share(known[width][2]),
        novel=novel_rates(*([known[tokens][group] for tokens in NOVEL_TOKENS] for group in (1, 2))),
    )
