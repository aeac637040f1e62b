"""How good the synthesized documents are: the five rates of the paper, by measures that need no judge, and two more.

The paper's rates (arXiv 2509.15248, section 4) come from language-model judges; ours come from shingles and embeddings,
so they are comparable between runs of this program, and only loosely with the published ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from sbp_fast.config import FilterConfig, RunConfig, resolve_device, resolve_threads
from sbp_fast.corpus.prepared import PreparedCorpus
from sbp_fast.corpus.shards import Corpus
from sbp_fast.corpus.shingles import ShingleTable, repeated_share
from sbp_fast.pairs.copies import first_of_equals
from sbp_fast.pairs.embed import Encoder
from sbp_fast.stage import Work

DUPLICATE_JACCARD = 0.6
LENGTH_BINS = 24


@dataclass(frozen=True)
class Measures:
    """What is known of each generated document; arrays of [documents].

    Attributes:
        tokens: int64, its length without begin and end.
        finished: bool, whether it came to its end by itself.
        first: bool, False for one with the tokens of an earlier one.
        repeated: float64, share of its shingle positions whose shingle occurs more than once in it.
        in_seed: float64, share of its shingles that occur in its seed.
        in_corpus: float64, share of its shingles that occur in any unique document.
    """

    tokens: np.ndarray
    finished: np.ndarray
    first: np.ndarray
    repeated: np.ndarray
    in_seed: np.ndarray
    in_corpus: np.ndarray

    @staticmethod
    def of(written: Corpus, unique: Corpus, config: FilterConfig) -> Measures:
        bodies = [written[document][1:-1] for document in range(len(written))]
        real = [unique[document][1:-1] for document in range(len(unique))]
        both = ShingleTable.build([*bodies, *real], config.shingle_tokens)
        documents = np.arange(len(bodies))
        first = np.zeros(len(bodies), bool)
        first[first_of_equals(bodies)] = True
        return Measures(
            tokens=np.array([len(body) for body in bodies]),
            finished=written.column("finished"),
            first=first,
            repeated=np.array([repeated_share(body, config.shingle_tokens) for body in bodies]),
            in_seed=both.containment(documents, len(bodies) + written.column("seed"))[0],
            in_corpus=known_share(bodies, real, config.shingle_tokens),
        )


def measure_quality(
    config: RunConfig, prepared: PreparedCorpus, written: Corpus, kept: np.ndarray, measures: Measures, low: float, work: Work
) -> None:
    """Record `quality`, `novel_shingles` and `lengths` in the manifest.

    Args:
        written: all generated documents; `kept`: the indices of those that passed.
        low: similarity below which a document does not count as related to its seed.
    """
    width, limit = config.filter.shingle_tokens, config.filter.copy_containment
    unique, heldout = _bodies(prepared.unique), _bodies(prepared.heldout)
    copies = (measures.in_seed >= limit) | same_letters(prepared, written)
    heldout_known = known_share(heldout, unique, width)
    kept_bodies = [written[int(document)][1:-1] for document in kept]
    work.record(
        quality={
            "repetition": rate(
                measures.repeated > 0,
                f"generated documents in which a run of {width} tokens occurs twice",
                real=np.array([repeated_share(body, width) > 0 for body in heldout]),
            ),
            "duplicates": rate(
                near_duplicates(kept_bodies, width),
                f"kept documents with Jaccard similarity of at least {DUPLICATE_JACCARD} to another kept one; the paper "
                "takes a million documents",
                real=near_duplicates(unique[: len(kept_bodies)], width),
            ),
            "non_factual": _unknown("not measured: needs a language-model judge"),
            "pair_irrelevance": _irrelevance(config, prepared, written, kept, low, work),
            "pair_copying": rate(
                copies,
                f"generated documents with {limit:.0%} or more of their {width}-token runs in their seed, or all its letters",
            ),
            "corpus_copying": rate(
                measures.in_corpus >= limit,
                f"generated documents with {limit:.0%} or more of their {width}-token runs in the unique documents",
                real=heldout_known >= limit,
            ),
        },
        novel_shingles={
            "synthetic": 1 - float(known_share(kept_bodies, unique, width).mean()),
            "real_heldout": 1 - float(heldout_known.mean()),
        },
        lengths=_lengths(kept_bodies, unique, config.model.context),
    )


def rate(found: np.ndarray, how: str, real: np.ndarray | None = None) -> dict[str, Any]:
    """The share of True in `found` with its 95% Wilson interval, and the same share among real documents."""
    interval = binomtest(int(found.sum()), len(found)).proportion_ci(method="wilson")
    return {
        "rate": float(found.mean()),
        "low": float(interval.low),
        "high": float(interval.high),
        "documents": len(found),
        "real_rate": None if real is None else float(real.mean()),
        "how": how,
    }


def known_share(bodies: list[np.ndarray], corpus: list[np.ndarray], width: int) -> np.ndarray:
    """Share of each text's shingles that occur anywhere in `corpus`. float64 [texts]."""
    table, known = ShingleTable.build(bodies, width), np.unique(ShingleTable.build(corpus, width).hashes)
    found = np.concatenate([[0], np.cumsum(np.isin(table.hashes, known))])[table.offsets]
    return np.diff(found) / np.diff(table.offsets)


def near_duplicates(bodies: list[np.ndarray], width: int) -> np.ndarray:
    """Which texts have a Jaccard similarity of at least 0.6, over their shingles, to another. bool [texts].

    Exact: two sets so alike share one of the least hashes of each, those before the last 60% (prefix filter; Chaudhuri,
    Ganti and Kaushik 2006), so only texts that share one of these are compared.
    """
    table = ShingleTable.build(bodies, width)
    sizes = np.diff(table.offsets)
    prefix = sizes - np.ceil(DUPLICATE_JACCARD * sizes).astype(np.int64) + 1
    owners = np.repeat(np.arange(len(bodies)), sizes)
    rank = np.arange(len(owners)) - table.offsets[owners]
    chosen = rank < prefix[owners]
    pairs = sorted({pair for run in _runs(table.hashes[chosen], owners[chosen]) for pair in run})
    duplicate = np.zeros(len(bodies), bool)
    if pairs:
        first, second = np.array(pairs).T
        shared = np.rint(table.containment(first, second)[0] * sizes[first])  # counts again, for an exact threshold
        alike = shared / (sizes[first] + sizes[second] - shared) >= DUPLICATE_JACCARD
        duplicate[first[alike]] = duplicate[second[alike]] = True
    return duplicate


def same_letters(prepared: PreparedCorpus, written: Corpus) -> np.ndarray:
    """Which generated documents equal their seed but for white space and punctuation. bool [documents]."""
    seeds = written.column("seed")
    letters = {int(seed): _letters(prepared.text(prepared.unique, int(seed))) for seed in np.unique(seeds)}
    return np.array([_letters(prepared.text(written, i)) == letters[int(seed)] for i, seed in enumerate(seeds)])


def _letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text)


def _runs(hashes: np.ndarray, owners: np.ndarray) -> Iterator[Iterator[tuple[int, int]]]:
    """The pairs of texts within each run of equal hashes."""
    order = np.lexsort((owners, hashes))
    for run in np.split(owners[order], np.flatnonzero(np.diff(hashes[order])) + 1):
        members = run.tolist()
        yield ((a, b) for place, a in enumerate(members) for b in members[place + 1 :])


def _irrelevance(
    config: RunConfig, prepared: PreparedCorpus, written: Corpus, kept: np.ndarray, low: float, work: Work
) -> dict[str, Any]:
    work.device = resolve_device(config)
    encoder = Encoder(config.embed, work.device, resolve_threads(config))
    chosen = np.sort(np.random.default_rng(config.seed).permutation(kept)[: config.filter.judged_documents])
    texts = [prepared.text(written, int(document)) for document in chosen]
    seeds = [prepared.text(prepared.unique, int(seed)) for seed in written.column("seed")[chosen]]
    lengths = encoder.count_tokens([*texts, *seeds])
    with work.console.task("documents compared with their seeds", len(lengths), "documents") as task:
        vectors = encoder.encode([*texts, *seeds], task.advance, lengths=lengths)
    work.flops = encoder.flops(lengths)
    drawn, owners = vectors[: len(texts)], vectors[len(texts) :]
    similarity = np.einsum("nd,nd->n", drawn, owners)
    # what a document has in common with any seed at all: the style of the corpus, not the topic
    elsewhere = np.einsum("nd,nd->n", drawn, np.roll(owners, len(owners) // 2, axis=0))
    means = {"mean_similarity": float(similarity.mean()), "mean_similarity_elsewhere": float(elsewhere.mean())}
    how = (
        f"kept documents whose similarity to their seed is below {low:.3f}, the low end of the band of pairs; it is "
        f"{means['mean_similarity']:.2f} on average, and {means['mean_similarity_elsewhere']:.2f} to another document's seed"
    )
    return rate(similarity < low, how) | means


def _lengths(synthetic: list[np.ndarray], real: list[np.ndarray], context: int) -> dict[str, list[int]]:
    edges = np.linspace(0, context, LENGTH_BINS + 1).astype(int)

    def histogram(bodies: list[np.ndarray]) -> list[int]:
        return np.histogram(np.minimum([len(body) for body in bodies], context), edges)[0].tolist()

    return {"edges": edges.tolist(), "synthetic": histogram(synthetic), "real": histogram(real)}


def _bodies(corpus: Corpus) -> list[np.ndarray]:
    return [corpus[document][1:-1] for document in range(len(corpus))]


def _unknown(how: str) -> dict[str, Any]:
    return {"rate": None, "low": None, "high": None, "documents": 0, "real_rate": None, "how": how}
