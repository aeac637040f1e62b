"""Whether synthetic documents are about what their seeds are about, by the embeddings that pairs were found with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sbp_fast.config import RunConfig, resolve_threads
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.evaluate.quality import rate
from sbp_fast.neighbors.encoder import SentenceEncoder
from sbp_fast.pairs.pairset import PairSet
from sbp_fast.pipeline.progress import Console

EDGES = np.linspace(-0.2, 1.0, 61).round(2)


@dataclass(frozen=True)
class Judged:
    """The kept documents that are looked at one by one, and what they are compared with.

    Attributes:
        documents: int64 [n], indices of kept documents.
        seeds: int64 [n], unique document that each was written after.
        elsewhere: int64 [n], the seed of another one: what any two documents of the corpus have in common.
        neighbours: int64 [n], a true partner of the seed in the pairs; -1 where it has none.
    """

    documents: np.ndarray
    seeds: np.ndarray
    elsewhere: np.ndarray
    neighbours: np.ndarray

    @staticmethod
    def draw(kept: Corpus, pairs: PairSet, count: int, seed: int) -> Judged:
        """At most `count` documents; the same seed draws the same."""
        generator = np.random.default_rng(seed)
        documents = np.sort(generator.permutation(len(kept))[:count])
        seeds = kept.column("seed")[documents]
        first, last = (np.searchsorted(pairs.seeds, seeds, side) for side in ("left", "right"))
        chosen = first + (generator.random(len(seeds)) * (last - first)).astype(np.int64)
        partners = np.append(pairs.partners, -1)[np.where(first < last, chosen, len(pairs.partners))]
        return Judged(documents, seeds, _of_others(seeds), partners)


def _of_others(seeds: np.ndarray) -> np.ndarray:
    """For each seed a different one of them, where there are two."""
    others = np.roll(seeds, len(seeds) // 2)
    same = others == seeds
    for place in np.flatnonzero(same).tolist():
        different = np.flatnonzero(seeds != seeds[place])
        if len(different):
            others[place] = seeds[different[place % len(different)]]
    return others


def similarities(
    config: RunConfig, prepared: PreparedCorpus, filtered: Corpus, judged: Judged, device: str, console: Console
) -> tuple[dict[str, np.ndarray], float]:
    """Return cosine similarities of the judged documents, and the FLOPs of the encoder.

    The similarities are float64 [n] arrays: "seed" of each document to its seed, "random" to another one's seed, and
    "neighbours" of its seed to a true partner, NaN where that has none.
    """
    encoder = SentenceEncoder(config.embed, device, resolve_threads(config))
    real, places = np.unique(np.concatenate([judged.seeds, judged.elsewhere, judged.neighbours]), return_inverse=True)
    texts = [prepared.text(filtered, int(document)) for document in judged.documents]
    texts += [prepared.text(prepared.unique, int(document)) if document >= 0 else "" for document in real]
    lengths = encoder.count_tokens(texts)
    with console.task("documents compared with their seeds", len(texts), "documents") as task:
        vectors = encoder.encode(texts, task.advance, lengths=lengths).astype(np.float64)
    written, known = vectors[: len(judged.documents)], vectors[len(judged.documents) :]
    seeds, elsewhere, neighbours = (known[one] for one in np.split(places, 3))
    near = np.where(judged.neighbours >= 0, np.einsum("nd,nd->n", seeds, neighbours), np.nan)
    similar = {
        "seed": np.einsum("nd,nd->n", written, seeds),
        "random": np.einsum("nd,nd->n", written, elsewhere),
        "neighbours": near,
    }
    return similar, encoder.flops(lengths)


def summarize_similarity(found: dict[str, np.ndarray], low: float) -> dict[str, Any]:
    """Means and histograms of the three similarities, and the low end of the band of pairs."""
    present = {name: values[~np.isnan(values)] for name, values in found.items()}
    histograms = {name: np.histogram(np.clip(one, EDGES[0], EDGES[-1]), EDGES)[0].tolist() for name, one in present.items()}
    means = {name: float(one.mean()) if len(one) else None for name, one in present.items()}
    below = {name: float((one < low).mean()) if len(one) else None for name, one in present.items()}
    return {"low": low, "means": means, "below": below, "histogram": {"edges": EDGES.tolist(), **histograms}}


def irrelevance(found: dict[str, np.ndarray], low: float) -> dict[str, Any]:
    """The rate of documents less similar to their seed than any pair is."""
    how = (
        f"kept documents whose embedding is less similar to their seed's than {low:.3f}, the low end of the band of pairs: "
        "a stand-in for a judge"
    )
    return rate(found["seed"] < low, how)
