"""Unit vectors in tight clusters within a wide space, like those of documents."""

from pathlib import Path

import numpy as np

from sbp_fast.neighbors.vectors import Storage, Vectors, write_vectors
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage


def unit_vectors(documents: int, dimension: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((documents, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def clustered_vectors(documents: int, dimension: int = 32, per_cluster: int = 12, seed: int = 0) -> np.ndarray:
    """Topics of clusters of documents; the further from its cluster's middle, the fewer near neighbors a document has."""
    generator = np.random.default_rng(seed)
    clusters = max(1, documents // per_cluster)
    topics = unit_vectors(max(1, clusters // 20), dimension, seed + 1)
    middles = topics[generator.integers(len(topics), size=clusters)] + 0.7 * unit_vectors(clusters, dimension, seed + 2)
    spread = generator.uniform(0.2, 0.9, (documents, 1)).astype(np.float32)
    vectors = middles[generator.integers(clusters, size=documents)] + spread * unit_vectors(documents, dimension, seed + 3)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def as_stage(vectors: np.ndarray, out: Path, shard: int = 700, storage: Storage = "float32") -> Vectors:
    """Write vectors in the format of `embed`."""

    def body(context: StageContext) -> None:
        for number, start in enumerate(range(0, len(vectors), shard)):
            write_vectors(context.directory / f"vectors-{number:05d}.npy", vectors[start : start + shard], storage)

    run_stage("embed", out, config={}, inputs={}, body=body, console=Console(quiet=True))
    return Vectors(out)
