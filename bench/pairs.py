"""The kNN self-join of all documents: CPU seconds, index building included, at equal recall of the pairs that count.

The peer libraries are installed apart from the project (`pip install --target`, then PYTHONPATH). Each gets the smallest
search budget that reaches the recall, found before its time starts; ours finds its own within its time. One thread each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch

from bench import machine
from bench.case import MINUTES_A_RUN, Case, Prepared, Provider, Tensors
from bench.nearest import nearest

Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""Indices of query vectors and a search budget -> the ids nearest to each, mostly the query itself too, and inner products."""

DIMENSION, NEIGHBOURS = 384, 32
LOW, TARGET, QUERIES = 0.75, 0.99, 500  # lower end of the paper's band; recall of the pairs in it; sampled documents
BUDGETS = [8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]


def pairs() -> Iterator[Case]:
    """The whole join on a CPU, which the peer libraries are made for; on CUDA the part that is computed there."""
    yield from nearest(clustered)
    if torch.cuda.is_available() or machine.tiny():
        return
    for documents in (50_000, 200_000):
        yield _case(documents)


def clustered(documents: int, generator: torch.Generator) -> torch.Tensor:
    """Return unit vectors in clusters of Zipf-distributed size, each spread in 12 directions of its own, with noise in all."""
    clusters, device = documents // 25, generator.device
    shares = 1 / torch.arange(1, clusters + 1, device=device) ** 0.8
    member = torch.multinomial(shares, documents, replacement=True, generator=generator)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    middles = torch.nn.functional.normalize(normal(clusters, DIMENSION), dim=1)
    directions = normal(clusters, 12, DIMENSION) / DIMENSION**0.5
    vectors = torch.empty(documents, DIMENSION, device=device)
    for start in range(0, documents, 10_000):
        own = member[start : start + 10_000]
        away = normal(len(own), 1, 12) @ directions[own]
        noise = normal(len(own), DIMENSION) / DIMENSION**0.5
        vectors[start : start + 10_000] = middles[own] + 0.25 * (away[:, 0] + noise)
    return torch.nn.functional.normalize(vectors, dim=1)


def _case(documents: int) -> Case:
    reached: dict[str, float] = {}  # search budgets and recalls

    def inputs(generator: torch.Generator) -> Tensors:
        return {"vectors": clustered(documents, generator)}

    providers = {
        "auto": _ours(reached),
        "hnswlib": _library(_hnswlib, reached, "hnswlib"),
        "faiss-cpu HNSW16,SQ8": _library(_faiss, reached, "faiss-cpu HNSW16,SQ8"),
        "scann-core": _library(_scann, reached, "scann-core"),
    }
    shape = {"documents": documents, "dimension": DIMENSION, "neighbours": NEIGHBOURS, "pair recall": TARGET}
    return Case(
        shape,
        inputs,
        providers,
        None,
        work=documents,
        unit="documents",
        statistics=reached,
        schedule=MINUTES_A_RUN,
        clock=time.process_time,
    )


def _ours(reached: dict[str, float]) -> Provider:
    def provider(tensors: Tensors) -> Prepared:
        from sbp_fast.config import PairConfig
        from sbp_fast.neighbors.backends import choose_backend
        from sbp_fast.neighbors.self_join import self_join
        from sbp_fast.neighbors.top_k import inner_products
        from sbp_fast.pipeline.progress import Console

        vectors, config = tensors["vectors"].numpy(), PairConfig(neighbors=NEIGHBOURS, target_recall=TARGET)

        def run() -> None:
            found = self_join(
                vectors,
                np.arange(len(vectors)),
                config,
                backend=choose_backend(config, len(vectors)),
                counted=lambda first, second: inner_products(vectors, first, vectors, second) >= LOW,
                seed=0,
                threads=1,
                device="cpu",
                console=Console(quiet=True),
            )
            reached.update({"auto: search budget": found.search_budget, "auto: pair recall": found.recall})

        return Prepared(run)

    return provider


def _library(build: Callable[[np.ndarray], Search], reached: dict[str, float], name: str) -> Provider:
    def provider(tensors: Tensors) -> Prepared:
        vectors = tensors["vectors"].numpy()
        sample, search = _sample(vectors), build(vectors)
        for budget in BUDGETS:
            recall, _ = sample.recall(*search(sample.rows, budget))
            if recall >= TARGET:
                reached.update({f"{name}: search budget": budget, f"{name}: pair recall": recall})
                return Prepared(partial(_build_and_search, build, vectors, budget))
        raise ValueError(f"finds {recall:.4f} of the pairs at most")

    return provider


def _build_and_search(build: Callable[[np.ndarray], Search], vectors: np.ndarray, budget: int) -> None:
    build(vectors)(np.arange(len(vectors)), budget)


def _sample(vectors: np.ndarray) -> Any:
    """The pairs of sampled documents whose score is in the band."""
    from sbp_fast.neighbors.exact import ExactSearcher
    from sbp_fast.neighbors.self_join import RecallSample

    queries = np.sort(np.random.default_rng(0).permutation(len(vectors))[:QUERIES])
    ids, scores = ExactSearcher(vectors, threads=1).search(queries, NEIGHBOURS)
    rows, columns = np.nonzero(scores >= LOW)
    return RecallSample(queries[rows], ids[rows, columns], scores[rows, columns])


def _hnswlib(vectors: np.ndarray) -> Search:
    index: Any = import_module("hnswlib").Index(space="ip", dim=vectors.shape[1])
    index.init_index(max_elements=len(vectors), M=16, ef_construction=200)
    index.add_items(vectors, num_threads=1)

    def search(rows: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
        index.set_ef(max(budget, NEIGHBOURS + 1))
        ids, distances = index.knn_query(vectors[rows], k=NEIGHBOURS + 1, num_threads=1)
        return ids.astype(np.int64), 1 - distances

    return search


def _faiss(vectors: np.ndarray) -> Search:
    faiss: Any = import_module("faiss")
    faiss.omp_set_num_threads(1)
    index = faiss.index_factory(vectors.shape[1], "HNSW16,SQ8", faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 200
    index.train(vectors)
    index.add(vectors)

    def search(rows: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
        index.hnsw.efSearch = budget
        products, ids = index.search(vectors[rows], NEIGHBOURS + 1)
        return ids, products

    return search


def _scann(vectors: np.ndarray) -> Search:
    builder = import_module("scann").scann_ops_pybind.builder(vectors, NEIGHBOURS + 1, "dot_product")
    leaves = round(len(vectors) ** 0.5)  # faster here than twice as many
    tree = builder.set_n_training_threads(1).tree(leaves, 8, training_sample_size=64 * leaves)
    searcher = tree.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(4 * NEIGHBOURS).build()

    def search(rows: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
        ids, products = searcher.search_batched(vectors[rows], leaves_to_search=budget)
        return np.asarray(ids, dtype=np.int64), np.asarray(products)

    return search
