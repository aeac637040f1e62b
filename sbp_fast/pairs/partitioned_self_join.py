"""kNN self-join of all documents, partition by partition; finished partitions stay on disk, so that a killed run resumes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sbp_fast.config import resolve_threads
from sbp_fast.data.external_sort import write_rows
from sbp_fast.neighbors.backends import AUTO, choose_backend
from sbp_fast.neighbors.hnsw import HnswIndex, metadata_path
from sbp_fast.neighbors.partition import assign_partitions
from sbp_fast.neighbors.saved_index import index_path
from sbp_fast.neighbors.self_join import SelfJoinResult, self_join
from sbp_fast.pairs.tasks import Pairing
from sbp_fast.pipeline.executors.executor import Advance, Holders
from sbp_fast.pipeline.files import save_array
from sbp_fast.pipeline.seals import marker_values, read_marker, write_marker

SEARCH_LOSS_SHARE = 0.5  # of the pairs that may be missed, where there are several partitions; the others lose the rest
NEIGHBOR = np.dtype([("member", "<i4"), ("similarity", "<f4")])  # a neighbor's index in the partition; -1 for none


@dataclass(frozen=True)
class Partition:
    """A partition to search, with the backend and target recall of its self-join."""

    number: int
    backend: str
    target_recall: float


def search_partitions(pairing: Pairing, holders: Holders[Pairing], checkpoint: Callable[[], object]) -> dict[str, Any]:
    """Search every partition that is not finished yet. On one machine they follow one after another.

    Args:
        pairing: what the tasks need.
        holders: that run the tasks.
        checkpoint: called after each partition.

    Returns:
        `backend`, `partitions` (their number), `largest_partition`, and of each partition `search_budgets` and `recalls`.

    Raises:
        UserError: a partition in which the target recall is not reached; an unknown backend.
    """
    _assign(pairing)
    sizes, settings = partition_sizes(pairing), pairing.settings
    backend = choose_backend(settings, max(sizes))
    named = f"{backend} (pair.backend is auto)" if settings.backend == AUTO else backend
    pairing.console.say(
        f"{len(pairing.documents)} documents in {len(sizes)} partitions of at most {max(sizes)}, searched by {named}"
    )
    # partitioning misses some pairs, too
    target = settings.target_recall if len(sizes) == 1 else 1 - (1 - settings.target_recall) * SEARCH_LOSS_SHARE
    results = [_result_path(pairing, number) for number in range(len(sizes))]
    missing = [Partition(number, backend, target) for number, path in enumerate(results) if read_marker(path) is None]
    for _ in holders.run(search_partition, missing, lambda amount: None):
        checkpoint()
    searched = [marker_values(path) for path in results]
    return {
        "backend": backend,
        "partitions": len(sizes),
        "largest_partition": max(sizes),
        "search_budgets": [result["search_budget"] for result in searched],
        "recalls": [result["recall"] for result in searched],
    }


def partition_sizes(pairing: Pairing) -> list[int]:
    """Return the number of documents in each partition."""
    return marker_values(_sizes_path(pairing))["sizes"]


def members_path(pairing: Pairing, partition: int) -> Path:
    """Return the path of the documents of a partition, int64 ascending."""
    return pairing.partitions / f"members-{partition:05d}.npy"


def neighbors_path(pairing: Pairing, partition: int) -> Path:
    """Return the path of the neighbors of a partition's documents, NEIGHBOR [members, neighbors]."""
    return pairing.partitions / f"neighbors-{partition:05d}.npy"


def _assign(pairing: Pairing) -> None:
    """Write the documents of every partition, and the sizes."""
    if read_marker(_sizes_path(pairing)) is not None:
        return
    pairing.partitions.mkdir(exist_ok=True)
    settings = pairing.settings
    partitions = assign_partitions(
        pairing.documents.vectors,
        settings.partition_documents,
        settings.partition_overlap,
        seed=pairing.config.seed,
        threads=resolve_threads(pairing.config),
    )
    for number, members in enumerate(partitions):
        save_array(members_path(pairing, number), members)
    files = [members_path(pairing, number) for number in range(len(partitions))]
    write_marker(_sizes_path(pairing), files, sizes=list(map(len, partitions)))  # last: the assignment is finished


def _sizes_path(pairing: Pairing) -> Path:
    return pairing.partitions / "sizes.json"


def _result_path(pairing: Pairing, partition: int) -> Path:
    return neighbors_path(pairing, partition).with_suffix(".json")


def search_partition(pairing: Pairing, partition: Partition, advance: Advance) -> None:
    """Write the neighbors of one partition's documents, and its index where one is saved."""
    documents, members = pairing.documents, np.load(members_path(pairing, partition.number))
    vectors, ids = documents.vectors[members], documents.rows[members]
    result = self_join(
        vectors,
        ids,
        pairing.settings.model_copy(update={"target_recall": partition.target_recall}),
        backend=partition.backend,
        counted=lambda first, second: pairing.qualify(members[first], members[second]),
        seed=pairing.config.seed,
        threads=pairing.placement.threads,
        device=pairing.placement.device,
        console=pairing.console,
    )
    pairing.console.detail(
        f"{result.recall:.4f} of the pairs in the band found from sampled documents, search budget {result.search_budget}"
    )
    index_files = _save_index(pairing, result, vectors, ids, index_path(pairing.directory, partition.number))
    path = neighbors_path(pairing, partition.number)
    write_rows(path, NEIGHBOR, member=result.ids, similarity=result.similarities)
    summary = {"search_budget": result.search_budget, "recall": result.recall}
    write_marker(_result_path(pairing, partition.number), [path, *index_files], **summary)  # last: the partition is finished


def _save_index(pairing: Pairing, result: SelfJoinResult, vectors: np.ndarray, ids: np.ndarray, path: Path) -> tuple[Path, ...]:
    """Save the index where one is wanted; return its files."""
    index, settings, seed = result.index, pairing.settings, pairing.config.seed
    if index is None and settings.save_index:
        m, ef_construction = settings.hnsw_m, settings.hnsw_ef_construction
        with pairing.console.task("documents indexed", len(ids), "documents") as task:
            index = HnswIndex.build(vectors, ids, m=m, ef_construction=ef_construction, seed=seed, task=task)
    if index is None:
        return ()
    path.parent.mkdir(exist_ok=True)
    index.save(path)
    return path, metadata_path(path)
