"""The documents that quality is measured on, and what of them occurs elsewhere."""

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
    """The documents that are measured.

    Attributes:
        written, kept: all documents, before and after the filters.
        drawn: int64, sorted indices of those measured of `written`.
        generated, passed, heldout, unique: their tokens, with <begin> and <end>: of `written`, of `kept`, and of real text.
    """

    written: Corpus
    kept: Corpus
    drawn: np.ndarray
    generated: list[np.ndarray]
    passed: list[np.ndarray]
    heldout: list[np.ndarray]
    unique: list[np.ndarray]

    @staticmethod
    def draw(config: RunConfig, prepared: PreparedCorpus, written: Corpus, kept: Corpus) -> Samples:
        count, generator = config.quality.measured_documents, np.random.default_rng(config.seed)
        drawn, passed, heldout = (np.sort(generator.permutation(len(one))[:count]) for one in (written, kept, prepared.heldout))
        return Samples(
            written,
            kept,
            drawn,
            [written[document] for document in drawn.tolist()],
            [kept[document] for document in passed.tolist()],
            [prepared.heldout[document] for document in heldout.tolist()],
            [prepared.unique[document] for document in range(min(len(passed), len(prepared.unique)))],
        )


@dataclass(frozen=True)
class Copied:
    """What of the generated documents occurs elsewhere.

    Attributes:
        repeated, in_seed: float64 [generated], as `compare_with_seeds` returns them.
        letters: bool [generated], equal to the seed but for white space and punctuation.
        in_corpus, heldout_in_corpus: float64, share of the shingles of generated and of held-out documents that any unique
            document has.
        novel: see `novel_rates`.
    """

    repeated: np.ndarray
    in_seed: np.ndarray
    letters: np.ndarray
    in_corpus: np.ndarray
    heldout_in_corpus: np.ndarray
    novel: list[dict[str, Any]]


def measure_copying(config: RunConfig, prepared: PreparedCorpus, samples: Samples) -> Copied:
    width, seeds = config.filter.shingle_tokens, samples.written.column("seed")[samples.drawn]
    groups: list[Batch] = [batch_of(one) for one in (samples.generated, samples.passed, samples.heldout)]
    known = {tokens: known_counts(groups, prepared.unique, tokens) for tokens in sorted({*NOVEL_TOKENS, width})}
    repeated, in_seed = compare_with_seeds(prepared, seeds, *groups[0], width)
    return Copied(
        repeated=repeated,
        in_seed=in_seed,
        letters=same_letters(prepared, samples.written, samples.drawn),
        in_corpus=known_share(known[width][0]),
        heldout_in_corpus=known_share(known[width][2]),
        novel=novel_rates(*([known[tokens][group] for tokens in NOVEL_TOKENS] for group in (1, 2))),
    )
