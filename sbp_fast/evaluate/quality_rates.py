"""Rates of bad synthetic documents: each is registered once, with its label, its measure and the paper's figures.

They are the paper's five rates (arXiv 2509.15248, section 4) and those that its reviewers asked for. docs/method.md says how
each differs from the paper's. The report's table, its table by source and results.json derive from this registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from sbp_fast.config import RunConfig
from sbp_fast.dedup.shingles import repeated_share
from sbp_fast.evaluate.judge_answers import judged_rates
from sbp_fast.evaluate.quality import DUPLICATE_JACCARD, near_duplicates, rate, unmeasured
from sbp_fast.evaluate.quality_samples import Copied, Samples
from sbp_fast.evaluate.relevance import Judged, irrelevance
from sbp_fast.registry import Registry

PUBLISHED_SOURCE = "arXiv 2509.15248, version of ICLR 2026"
PUBLISHED_DUPLICATES_AMONG = 1_000_000
PUBLISHED_COLUMNS = ("200B", "1T, 3B", "1T, 6B", "real")
"""Training tokens and size of the paper's models; the last column is real text."""


@dataclass(frozen=True)
class Measured:
    """Measurements that all rates are computed from.

    Attributes:
        samples: documents before and after the filters, and real ones.
        copied: shares of the generated documents that occur elsewhere.
        judged: filtered documents that were embedded, and judged where there is a judge.
        similar: cosine similarities of the judged documents (see `similarities`), NaN where the encoder is not here.
        low: low end of the similarity band of pairs.
        judge_counts: counts of the judge's verdicts (see `verdict_counts`); None without a judge.
        verdicts: rate -> float64 [judged], 1 for a bad document, 0 for another, NaN without a verdict; empty without a judge.
    """

    config: RunConfig
    samples: Samples
    copied: Copied
    judged: Judged
    similar: dict[str, np.ndarray]
    low: float
    judge_counts: dict[str, Any] | None = None
    verdicts: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def bodies(self) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """Tokens between <begin> and <end> of filtered, held-out and unique documents."""
        passed, heldout, unique = (
            [document[1:-1] for document in documents]
            for documents in (self.samples.passed, self.samples.heldout, self.samples.unique)
        )
        return passed, heldout, unique


@dataclass(frozen=True)
class QualityRate:
    """A rate; lower is better.

    Attributes:
        label: name in the report.
        measure: returns the rate with its interval (see `rate`), or `unmeasured`.
        documents: documents that `flags` has an entry for: the generated or the judged ones.
        flags: returns float64 or bool, 1 for a bad document, NaN where that is not known; rates by source derive from it.
        published: the paper's figures in the order of `PUBLISHED_COLUMNS`, None where it gives none.
        as_in_paper: returns whether it was measured as in the paper, so that the two may stand in one column.
    """

    label: str
    measure: Callable[[Measured], dict[str, Any]]
    documents: Literal["", "generated", "judged"] = ""
    flags: Callable[[Measured], np.ndarray] | None = None
    published: tuple[float | None, ...] = ()
    as_in_paper: Callable[[Measured], bool] = lambda measured: False


QUALITY_RATES: Registry[QualityRate] = Registry("quality rate")


def measure_rates(measured: Measured) -> dict[str, dict[str, Any]]:
    """Return every registered rate by name, with its label and whether it was measured as in the paper."""
    return {
        name: entry.measure(measured) | {"label": entry.label, "as_in_paper": entry.as_in_paper(measured)}
        for name, entry in QUALITY_RATES.items()
    }


def rates_by_source(measured: Measured, of_seeds: np.ndarray) -> dict[str, Any]:
    """Return the rates among the documents whose seed is of each source.

    Args:
        measured: the measurements.
        of_seeds: source of each unique document.
    """
    samples = measured.samples
    sources = {
        "generated": of_seeds[samples.written.column("seed")[samples.measured]],
        "judged": of_seeds[measured.judged.seeds],
    }
    lengths = np.array([len(document) - 2 for document in samples.generated])
    flags = {
        name: (entry.documents, np.asarray(entry.flags(measured), np.float64))
        for name, entry in QUALITY_RATES.items()
        if entry.flags is not None
    }

    def share(source: str, documents: str, bad: np.ndarray) -> float | None:
        known = (sources[documents] == source) & ~np.isnan(bad)
        return float(bad[known].mean()) if known.any() else None

    def of(source: str) -> dict[str, Any]:
        generated = sources["generated"] == source
        return {
            "documents": int(generated.sum()),
            "mean_tokens": float(lengths[generated].mean()),
            "judged": int((sources["judged"] == source).sum()),
            "rates": {name: share(source, documents, bad) for name, (documents, bad) in flags.items()},
        }

    return {source: of(source) for source in sorted(set(sources["generated"].tolist()))}


def published_rates() -> dict[str, Any]:
    """Return the paper's rates: column -> rate for each name, with their source."""
    rates: Mapping[str, Any] = {
        name: dict(zip(PUBLISHED_COLUMNS, entry.published, strict=True))
        for name, entry in QUALITY_RATES.items()
        if entry.published
    }
    return {"source": PUBLISHED_SOURCE, "columns": list(PUBLISHED_COLUMNS), "rates": rates}


def _shingles(measured: Measured) -> tuple[int, float]:
    """Return the filters' shingle length in tokens, and the share of shingles from which they reject a copy."""
    return measured.config.filter.shingle_tokens, measured.config.filter.copy_containment


def _repetition(measured: Measured) -> dict[str, Any]:
    width, (_, heldout, _) = _shingles(measured)[0], measured.bodies
    return rate(
        measured.copied.repeated > 0,
        f"generated documents in which a run of {width} tokens occurs twice",
        np.array([repeated_share(body, width) > 0 for body in heldout]),
        "held-out documents",
    )


def _duplicates(measured: Measured) -> dict[str, Any]:
    width, (passed, _, unique) = _shingles(measured)[0], measured.bodies
    return rate(
        near_duplicates(passed, width),
        f"of {len(passed)} filtered documents, those with Jaccard similarity of {DUPLICATE_JACCARD} or more to another; the "
        "paper takes a million",
        near_duplicates(unique, width),
        f"{len(unique)} unique documents",
    )


def _non_factual(measured: Measured) -> dict[str, Any]:
    if measured.judge_counts is None:
        return unmeasured("not measured: needs a language-model judge")
    return judged_rates(measured.judge_counts, measured.verdicts)["non_factual"]


def _pair_irrelevance(measured: Measured) -> dict[str, Any]:
    if measured.judge_counts is None:
        return irrelevance(measured.similar, measured.low)
    return judged_rates(measured.judge_counts, measured.verdicts)["pair_irrelevance"]


def _is_judged(measured: Measured) -> bool:
    return measured.judge_counts is not None


def _among_as_many(measured: Measured) -> bool:
    return len(measured.samples.passed) == PUBLISHED_DUPLICATES_AMONG


def _irrelevant(measured: Measured) -> np.ndarray:
    seed = measured.similar["seed"]
    return measured.verdicts.get("pair_irrelevance", np.where(np.isnan(seed), np.nan, seed < measured.low))


def _pair_copying(measured: Measured) -> dict[str, Any]:
    return rate(measured.copied.letters, "generated documents that equal their seed but for white space and punctuation")


def _in_seed(measured: Measured) -> np.ndarray:
    return measured.copied.in_seed >= _shingles(measured)[1]


def _pair_containment(measured: Measured) -> dict[str, Any]:
    width, limit = _shingles(measured)
    return rate(_in_seed(measured), f"generated documents with {limit:.0%} or more of their {width}-token runs in their seed")


def _in_corpus(measured: Measured) -> np.ndarray:
    return measured.copied.in_corpus >= _shingles(measured)[1]


def _corpus_copying(measured: Measured) -> dict[str, Any]:
    width, limit = _shingles(measured)
    return rate(
        _in_corpus(measured),
        f"generated documents with {limit:.0%} or more of their {width}-token runs in the unique documents",
        measured.copied.heldout_in_corpus >= limit,
        "held-out documents",
    )


for _name, _rate in {
    "repetition": QualityRate(
        "Repetition", _repetition, "generated", lambda measured: measured.copied.repeated > 0, (0.043, 0.039, 0.026, 0.018)
    ),
    "duplicates": QualityRate("Duplicates", _duplicates, published=(0.008, 0.008, 0.003, 0.007), as_in_paper=_among_as_many),
    "non_factual": QualityRate("Non-factual", _non_factual, published=(0.151, 0.087, 0.065, 0.018), as_in_paper=_is_judged),
    "pair_irrelevance": QualityRate(
        "Pair-irrelevance", _pair_irrelevance, "judged", _irrelevant, (0.256, 0.078, 0.060, None), as_in_paper=_is_judged
    ),
    "pair_copying": QualityRate(
        "Pair-copying", _pair_copying, published=(0.001, 0.009, 0.003, None), as_in_paper=lambda measured: True
    ),
    "pair_containment": QualityRate("Pair-containment", _pair_containment, "generated", _in_seed),
    "corpus_copying": QualityRate("Corpus-copying", _corpus_copying, "generated", _in_corpus),
}.items():
    QUALITY_RATES.register(_name, _rate)
