"""The neighbours of all documents, cell by cell; each cell's are kept until all are there, so that a killed run resumes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sbp_fast.config import RunConfig, resolve_threads
from sbp_fast.files import atomic_open, read_json, write_json
from sbp_fast.pairs.documents import Documents
from sbp_fast.pairs.join.cells import Merged, route
from sbp_fast.pairs.join.hnsw import HnswIndex
from sbp_fast.pairs.join.join import Backend, Neighbours, Wanted, choose_backend, self_join
from sbp_fast.progress import Console
from sbp_fast.stage import Work
from sbp_fast.workers.workers import Advance, Place, Workers

SHARE_OF_JOINS = 0.5  # in what may be lost where there are several cells
CELLS, INDEX, ROUTES = "cells", "index", "routes.npz"


def join_cells(
    config: RunConfig, documents: Documents, wanted: Wanted, work: Work, workers: Workers
) -> tuple[Merged, dict[str, Any]]:
    """Join every cell that is not joined yet, and merge what they found. On this machine they go one after another.

    Args:
        wanted: which pairs of documents count for the recall that decides the effort.

    Returns:
        The merged neighbours, and what the joins took: `backend`, `cells`, `largest_cell`, and of each cell `efforts` and
        `recalls`.

    Raises:
        UserError: a cell in which the target recall is not reached.
    """
    folder, settings = work.directory / CELLS, config.pair
    folder.mkdir(exist_ok=True)
    cells = _routes(config, documents, folder)
    largest = max(map(len, cells))
    backend = choose_backend(settings, largest)
    chosen = f"{backend} (pair.backend is auto)" if settings.backend == "auto" else backend
    work.console.say(f"{len(documents)} documents in {len(cells)} cells of at most {largest}, joined by {chosen}")
    if len(cells) > 1:  # routing loses some pairs, too
        target = 1 - (1 - settings.target_recall) * SHARE_OF_JOINS
        config = config.model_copy(update={"pair": settings.model_copy(update={"target_recall": target})})
    missing = [cell for cell in range(len(cells)) if not _facts_path(work.directory, cell).is_file()]
    make = partial(_Joiner, config, documents, wanted, backend, work.directory, work.console)
    with workers.hold(make, config) as joiners:
        work.device = "cpu" if backend == "hnswlib" else joiners.place.device
        for _ in joiners.run(_join_cell, missing, lambda amount: None):
            work.keep_clock()
    merged = Merged(len(documents), settings.neighbours)
    for cell, rows in enumerate(cells):
        with np.load(_found_path(work.directory, cell)) as arrays:
            merged.add(rows, arrays["ids"], arrays["similarities"])
    took = [read_json(_facts_path(work.directory, cell)) for cell in range(len(cells))]
    return merged, {
        "backend": backend,
        "cells": len(cells),
        "largest_cell": largest,
        "efforts": [cell["effort"] for cell in took],
        "recalls": [cell["recall"] for cell in took],
    }


def index_path(directory: Path, cell: int) -> Path:
    """Where the kept index of a cell lies in the output of `pair`."""
    return directory / INDEX / f"cell-{cell:05d}.hnsw"


def _routes(config: RunConfig, documents: Documents, folder: Path) -> list[np.ndarray]:
    path, settings = folder / ROUTES, config.pair
    if not path.is_file():
        cells = route(
            documents.vectors,
            settings.cell_documents,
            settings.cell_overlap,
            seed=config.seed,
            threads=resolve_threads(config),
        )
        with atomic_open(path) as file:
            np.savez(file, *cells)
    with np.load(path) as arrays:
        return [arrays[name] for name in arrays.files]


def _found_path(directory: Path, cell: int) -> Path:
    return directory / CELLS / f"found-{cell:05d}.npz"


def _facts_path(directory: Path, cell: int) -> Path:
    return directory / CELLS / f"found-{cell:05d}.json"


@dataclass(frozen=True)
class _Joiner:
    """What it takes to join any cell."""

    config: RunConfig
    documents: Documents
    wanted: Wanted
    backend: Backend
    directory: Path
    console: Console
    place: Place


def _join_cell(joiner: _Joiner, cell: int, advance: Advance) -> None:
    """Write the neighbours of one cell's documents, and its index where one is kept."""
    documents = joiner.documents
    with np.load(joiner.directory / CELLS / ROUTES) as arrays:
        rows = arrays[arrays.files[cell]]
    vectors, ids = documents.vectors[rows], documents.rows[rows]
    joined = self_join(
        vectors,
        ids,
        joiner.config.pair,
        backend=joiner.backend,
        wanted=lambda first, second: joiner.wanted(rows[first], rows[second]),
        seed=joiner.config.seed,
        threads=joiner.place.threads,
        device=joiner.place.device,
        console=joiner.console,
    )
    joiner.console.say(f"{joined.recall:.4f} of the pairs in the band found from sampled documents, effort {joined.effort}")
    _keep_index(joiner, joined, vectors, ids, index_path(joiner.directory, cell))
    with atomic_open(_found_path(joiner.directory, cell)) as file:
        np.savez(file, ids=np.where(joined.ids >= 0, rows[joined.ids], -1), similarities=joined.similarities)
    facts = {"effort": joined.effort, "recall": joined.recall}
    write_json(_facts_path(joiner.directory, cell), facts)  # last: it marks the cell as finished


def _keep_index(joiner: _Joiner, joined: Neighbours, vectors: np.ndarray, ids: np.ndarray, path: Path) -> None:
    index, settings = joined.index, joiner.config.pair
    if index is None and settings.keep_index:
        links, construction = settings.hnsw_links, settings.hnsw_construction
        with joiner.console.task("documents indexed", len(ids), "documents") as task:
            index = HnswIndex.build(vectors, ids, links=links, construction=construction, seed=joiner.config.seed, task=task)
    if index is not None:
        path.parent.mkdir(exist_ok=True)
        index.save(path)
