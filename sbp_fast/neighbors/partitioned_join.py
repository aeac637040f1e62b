"""The neighbours of all documents, cell by cell; each cell's are kept until all are there, so that a killed run resumes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sbp_fast.config import resolve_threads
from sbp_fast.data.external_sort import write_rows
from sbp_fast.neighbors.hnsw import HnswIndex
from sbp_fast.neighbors.partition import route
from sbp_fast.neighbors.self_join import Backend, Neighbours, choose_backend, self_join
from sbp_fast.pairs.tasks import Pairing
from sbp_fast.pipeline.executors.executor import Advance, Holders
from sbp_fast.pipeline.files import read_json, save_array, write_json
from sbp_fast.pipeline.stage import Work

SHARE_OF_JOINS = 0.5  # in what may be lost where there are several cells
INDEX = "index"
FOUND = np.dtype([("member", "<i4"), ("similarity", "<f4")])  # a neighbour, by its place in the cell; -1 for none


@dataclass(frozen=True)
class Cell:
    """A cell to join."""

    number: int
    backend: Backend
    target_recall: float


def join_cells(pairing: Pairing, holders: Holders[Pairing], work: Work) -> dict[str, Any]:
    """Join every cell that is not joined yet. On one machine they go one after another.

    Returns:
        What the joins took: `backend`, `cells`, `largest_cell`, and of each cell `efforts` and `recalls`.

    Raises:
        UserError: a cell in which the target recall is not reached.
    """
    _route(pairing)
    sizes, settings = cell_sizes(pairing), pairing.settings
    backend = choose_backend(settings, max(sizes))
    chosen = f"{backend} (pair.backend is auto)" if settings.backend == "auto" else backend
    pairing.console.say(f"{len(pairing.documents)} documents in {len(sizes)} cells of at most {max(sizes)}, joined by {chosen}")
    # routing loses some pairs, too
    target = settings.target_recall if len(sizes) == 1 else 1 - (1 - settings.target_recall) * SHARE_OF_JOINS
    facts = [_facts_path(pairing, cell) for cell in range(len(sizes))]
    missing = [Cell(number, backend, target) for number, path in enumerate(facts) if not path.is_file()]
    work.device = "cpu" if backend == "hnswlib" else holders.place.device
    for _ in holders.run(_join_cell, missing, lambda amount: None):
        work.keep_clock()
    took = [read_json(path) for path in facts]
    return {
        "backend": backend,
        "cells": len(sizes),
        "largest_cell": max(sizes),
        "efforts": [cell["effort"] for cell in took],
        "recalls": [cell["recall"] for cell in took],
    }


def cell_sizes(pairing: Pairing) -> list[int]:
    """How many members each cell has."""
    return read_json(_marker(pairing))


def members_path(pairing: Pairing, cell: int) -> Path:
    """Where the documents of a cell lie, int64 ascending."""
    return pairing.cells / f"members-{cell:05d}.npy"


def found_path(pairing: Pairing, cell: int) -> Path:
    """Where the neighbours of a cell's documents lie, FOUND [members, neighbours]."""
    return pairing.cells / f"found-{cell:05d}.npy"


def index_path(directory: Path, cell: int) -> Path:
    """Where the kept index of a cell lies in the output of `pair`."""
    return directory / INDEX / f"cell-{cell:05d}.hnsw"


def _route(pairing: Pairing) -> None:
    """Write the members of every cell, and how many each has."""
    if _marker(pairing).is_file():
        return
    pairing.cells.mkdir(exist_ok=True)
    vectors, settings = pairing.documents.vectors, pairing.settings
    threads = resolve_threads(pairing.config)
    cells = route(vectors, settings.cell_documents, settings.cell_overlap, seed=pairing.config.seed, threads=threads)
    for cell, members in enumerate(cells):
        save_array(members_path(pairing, cell), members)
    write_json(_marker(pairing), list(map(len, cells)))


def _marker(pairing: Pairing) -> Path:
    return pairing.cells / "cells.json"


def _facts_path(pairing: Pairing, cell: int) -> Path:
    return found_path(pairing, cell).with_suffix(".json")


def _join_cell(pairing: Pairing, cell: Cell, advance: Advance) -> None:
    """Write the neighbours of one cell's documents, and its index where one is kept."""
    documents, members = pairing.documents, np.load(members_path(pairing, cell.number))
    vectors, ids = documents.vectors[members], documents.rows[members]
    joined = self_join(
        vectors,
        ids,
        pairing.settings.model_copy(update={"target_recall": cell.target_recall}),
        backend=cell.backend,
        wanted=lambda first, second: pairing.wanted(members[first], members[second]),
        seed=pairing.config.seed,
        threads=pairing.place.threads,
        device=pairing.place.device,
        console=pairing.console,
    )
    pairing.console.say(f"{joined.recall:.4f} of the pairs in the band found from sampled documents, effort {joined.effort}")
    _keep_index(pairing, joined, vectors, ids, index_path(pairing.directory, cell.number))
    write_rows(found_path(pairing, cell.number), FOUND, member=joined.ids, similarity=joined.similarities)
    facts = {"effort": joined.effort, "recall": joined.recall}
    write_json(_facts_path(pairing, cell.number), facts)  # last: it marks the cell as finished


def _keep_index(pairing: Pairing, joined: Neighbours, vectors: np.ndarray, ids: np.ndarray, path: Path) -> None:
    index, settings = joined.index, pairing.settings
    if index is None and settings.keep_index:
        links, construction = settings.hnsw_links, settings.hnsw_construction
        with pairing.console.task("documents indexed", len(ids), "documents") as task:
            index = HnswIndex.build(vectors, ids, links=links, construction=construction, seed=pairing.config.seed, task=task)
    if index is not None:
        path.parent.mkdir(exist_ok=True)
        index.save(path)
