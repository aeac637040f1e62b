"""Relevance of synthetic documents to their seeds, by the embeddings that pairs were found with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sbp_fast.config import RunConfig, resolve_threads
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.evaluate.quality import rate, unmeasured
from sbp_fast.neighbors.encoders import open_encoder
from sbp_fast.pairs.pairset import PairSet
from sbp_fast.pipeline.progress import Console

EDGES = np.linspace(-0.2, 1.0, 61).round(2)


@dataclass(frozen=True)
class Judged:
    """The judged documents, and the unique documents that they are compared with.

    Attributes:
        documents: int64 [n], indices of filtered documents.
        seeds: int64 [n], unique document that each was generated after.
        elsewhere: int64 [n], seed of another judged document: a control for what any two documents have in common.
        neighbors: int64 [n], a true partner of the seed in the pairs; -1 where it has none.
    """

    documents: np.ndarray
    seeds: np.ndarray
    elsewhere: np.ndarray
    neighbors: np.ndarray

    @staticmethod
    def sample(filtered: Corpus, pairs: PairSet, count: int, seed: int) -> Judged:
        """Return at most `count` documents; the same seed gives the same documents."""
        generator = np.random.default_rng(seed)
        documents = np.sort(generator.permutation(len(filtered))[:count])
        seeds = filtered.column("seed")[documents]
        first, last = (np.searchsorted(pairs.seeds, seeds, side) for side in ("left", "right"))
        chosen = first + (generator.random(len(seeds)) * (last - first)).astype(np.int64)
        partners = np.append(pairs.partners, -1)[np.where(first < last, chosen, len(pairs.partners))]
        return Judged(documents, seeds, _of_others(seeds), partners)


def _of_others(seeds: np.ndarray) -> np.ndarray:
    """Return for each seed a different one of the seeds; the same one if all are equal."""
    others = np.roll(seeds, len(seeds) // 2)
    same = others == seeds
    for index in np.flatnonzero(same).tolist():
        different = np.flatnonzero(seeds != seeds[index])
        if len(different):
            others[index] = seeds[different[index % len(different)]]
    return others


def similarities(
    config: RunConfig, prepared: PreparedCorpus, filtered: Corpus, judged: Judged, device: str, console: Console
) -> tuple[dict[str, np.ndarray], float]:
    """Return cosine similarities of the judged documents, and the FLOPs of the encoder.

    The similarities are float64 [n] arrays: "seed" of each document to its seed, "random" of each document to the seed of
    another, and "neighbors" of its seed to a true partner of that seed, NaN where the seed has none.
    """
    encoder = open_encoder(config.embed, device, resolve_threads(config))
    partners = np.where(judged.neighbors >= 0, judged.neighbors, judged.seeds)
    real, positions = np.unique(np.concatenate([judged.seeds, judged.elsewhere, partners]), return_inverse=True)
    texts = [prepared.text(filtered, int(document)) for document in judged.documents]
    texts += [prepared.text(prepared.unique, int(document)) for document in real]
    lengths = encoder.lengths_of(texts)
    with console.task("documents compared with their seeds", len(texts), "documents") as task:
        vectors = encoder.encode(texts, task.advance, lengths=lengths).astype(np.float64)
    written, known = vectors[: len(judged.documents)], vectors[len(judged.documents) :]
    seeds, elsewhere, neighbors = (known[indices] for indices in np.split(positions, 3))
    near = np.where(judged.neighbors >= 0, np.einsum("nd,nd->n", seeds, neighbors), np.nan)
    similar = {
        "seed": np.einsum("nd,nd->n", written, seeds),
        "random": np.einsum("nd,nd->n", written, elsewhere),
        "neighbors": near,
    }
    return similar, encoder.flops(lengths)


def no_similarities(judged: Judged) -> dict[str, np.ndarray]:
    """Return NaN for each of the `similarities`: those of documents by an encoder that is not here."""
    return {name: np.full(len(judged.documents), np.nan) for name in ("seed", "random", "neighbors")}


def summarize_similarity(similar: dict[str, np.ndarray], low: float) -> dict[str, Any]:
    """Return means and histograms of the three similarities, and the share of each below `low`, the low end of the band."""
    present = {name: values[~np.isnan(values)] for name, values in similar.items()}
    histograms = {
        name: np.histogram(np.clip(values, EDGES[0], EDGES[-1]), EDGES)[0].tolist() for name, values in present.items()
    }
    means = {name: float(values.mean()) if len(values) else None for name, values in present.items()}
    below = {name: float((values < low).mean()) if len(values) else None for name, values in present.items()}
    return {"low": low, "means": means, "below": below, "histogram": {"edges": EDGES.tolist(), **histograms}}


def irrelevance(similar: dict[str, np.ndarray], low: float) -> dict[str, Any]:
    """Return the rate of documents that are less similar to their seed than any pair is; unmeasured without similarities."""
    if len(similar["seed"]) and np.isnan(similar["seed"]).all():
        return unmeasured("not measured: needs a language-model judge, or the encoder that pairs were found with")
    how = (
        f"filtered documents whose embedding is less similar to their seed's than {low:.3f}, the low end of the band of pairs: "
        "a stand-in for a judge"
    )
    return rate(similar["seed"] < low, how)
