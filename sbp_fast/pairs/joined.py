"""The neighbours of all documents, cell by cell; each cell's are kept until all are there, so that a killed run resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sbp_fast.config import RunConfig, resolve_device, resolve_threads
from sbp_fast.files import atomic_open, read_json, write_json
from sbp_fast.pairs.documents import Documents
from sbp_fast.pairs.join.cells import Merged, route
from sbp_fast.pairs.join.hnsw import HnswIndex
from sbp_fast.pairs.join.join import Neighbours, Wanted, choose_backend, self_join
from sbp_fast.stage import Work

SHARE_OF_JOINS = 0.5  # in what may be lost where there are several cells
CELLS, INDEX, ROUTES = "cells", "index", "routes.npz"


def join_cells(config: RunConfig, documents: Documents, wanted: Wanted, work: Work) -> tuple[Merged, dict[str, Any]]:
    """Join every cell that is not joined yet, one after another, and merge what they found.

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
    work.device = "cpu" if backend == "hnswlib" else resolve_device(config)
    chosen = f"{backend} (pair.backend is auto)" if settings.backend == "auto" else backend
    work.console.say(f"{len(documents)} documents in {len(cells)} cells of at most {largest}, joined by {chosen}")
    if len(cells) > 1:  # routing loses some pairs, too
        target = 1 - (1 - settings.target_recall) * SHARE_OF_JOINS
        config = config.model_copy(update={"pair": settings.model_copy(update={"target_recall": target})})
    merged, took = Merged(len(documents), settings.neighbours), []
    for cell, rows in enumerate(cells):
        found, facts = folder / f"found-{cell:05d}.npz", folder / f"found-{cell:05d}.json"
        if not facts.is_file():
            joined = _join_cell(config, documents, rows, backend, wanted, work, cell)
            ids = np.where(joined.ids >= 0, rows[joined.ids], -1)
            with atomic_open(found) as file:
                np.savez(file, ids=ids, similarities=joined.similarities)
            write_json(facts, {"effort": joined.effort, "recall": joined.recall})  # last: it marks the cell as finished
            work.keep_clock()
        with np.load(found) as arrays:
            merged.add(rows, arrays["ids"], arrays["similarities"])
        took.append(read_json(facts))
    efforts, recalls = [cell["effort"] for cell in took], [cell["recall"] for cell in took]
    return merged, {
        "backend": backend,
        "cells": len(cells),
        "largest_cell": largest,
        "efforts": efforts,
        "recalls": recalls,
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


def _join_cell(
    config: RunConfig, documents: Documents, rows: np.ndarray, backend: Any, wanted: Wanted, work: Work, cell: int
) -> Neighbours:
    settings, vectors, ids = config.pair, documents.vectors[rows], documents.rows[rows]
    joined = self_join(
        vectors,
        ids,
        settings,
        backend=backend,
        wanted=lambda first, second: wanted(rows[first], rows[second]),
        seed=config.seed,
        threads=resolve_threads(config),
        device=resolve_device(config),
        console=work.console,
    )
    work.console.say(f"{joined.recall:.4f} of the pairs in the band found from sampled documents, effort {joined.effort}")
    index = joined.index
    if index is None and settings.keep_index:
        with work.console.task("documents indexed", len(rows), "documents") as task:
            index = HnswIndex.build(
                vectors, ids, links=settings.hnsw_links, construction=settings.hnsw_construction, seed=config.seed, task=task
            )
    if index is not None:
        path = index_path(work.directory, cell)
        path.parent.mkdir(exist_ok=True)
        index.save(path)
    return joined
