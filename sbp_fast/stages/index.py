"""The stage `index`: the documents of another corpus added to an index that was kept, which stays as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from sbp_fast.config import RunConfig
from sbp_fast.config.files import diff_config
from sbp_fast.errors import UserError
from sbp_fast.neighbors.hnsw import HnswIndex, facts_path
from sbp_fast.neighbors.partitioned_join import INDEX, index_path
from sbp_fast.neighbors.saved_index import KeptIndex, Member, embedding_of, write_members
from sbp_fast.neighbors.vectors import READ_BLOCK, Vectors
from sbp_fast.pipeline.files import atomic_path, link
from sbp_fast.pipeline.progress import Console, Task
from sbp_fast.pipeline.stage import Manifest, Work, run_stage

LEFT_OUT = "left-out.parquet"
SETTINGS = {"cell_documents", "hnsw_links", "hnsw_construction"}
MEANING = {"model", "maximum_tokens", "prompt", "dimensions"}  # what decides whether two vectors can be compared


def index(
    config: RunConfig,
    to: Path,
    corpus: Path,
    vectors: Path,
    out: Path,
    *,
    console: Console,
    force: bool = False,
) -> Manifest:
    """Add the unique documents of a corpus to a kept index.

    A document whose vector equals one in the index, or an earlier one of its own corpus, is left out: among many copies a graph
    loses others. The rest go to the cell with the fewest documents until that has `pair.cell_documents`, then to the next, then
    to new cells. Who asks an index asks all of its cells, so it does not matter which; this way the fewest files change, and
    the others are links to those of `to`, or copies where the file system has no links.

    Writes `index/`, `members.json` and `left-out.parquet`.

    Args:
        config: `pair.cell_documents`, and for new cells `pair.hnsw_links`, `pair.hnsw_construction` and `seed`.
        to: output of `pair` that kept an index, or of an earlier `index`.
        corpus, vectors: what to add: outputs of `prepare`, and of `embed` with the settings of those in the index.

    Raises:
        UserError: no index, a corpus that is already in it, vectors of another corpus or made otherwise.
    """

    def body(work: Work) -> None:
        kept, new = KeptIndex(to, hashed=False), Vectors(vectors, hashed=False)
        _check(kept, new, corpus)
        _add(config, kept, new, work)

    pair = config.pair.model_dump(mode="json", include=SETTINGS)
    return run_stage(
        "index",
        out,
        config={"pair": pair, "seed": config.seed},
        inputs={"index": to, "corpus": corpus, "vectors": vectors},
        body=body,
        console=console,
        force=force,
    )


def _check(kept: KeptIndex, new: Vectors, corpus: Path) -> None:
    fingerprint = Manifest.load(corpus, "prepare", hashed=False).fingerprint
    if fingerprint in (member.corpus for member in kept.members):
        raise UserError(corpus, f"is already in the index in {kept.directory}", "give another --corpus")
    if new.manifest.inputs["corpus"] != fingerprint:
        raise UserError(new.directory, f"not the vectors of {corpus}", "run embed on this corpus first")
    old, mine = (settings.model_dump(include=MEANING) for settings in (kept.embedding, embedding_of(new)))
    changes = diff_config(old, mine, "embed.")
    if new.dimension != kept.dimension:
        changes.append(f"dimension of the vectors: {kept.dimension} -> {new.dimension}")
    if changes:
        what = f"not embedded as those of the index in {kept.directory}: {'; '.join(changes)}"
        raise UserError(new.directory, what, "embed the corpus with the same settings")


def _add(config: RunConfig, kept: KeptIndex, new: Vectors, work: Work) -> None:
    last = kept.members[-1]
    member = Member.of(new, first=last.first + last.documents)
    left_out = _left_out(kept, new, member.first, work)
    rows = np.setdiff1d(np.arange(len(new)), left_out)
    added = share_out(kept.cell_documents, len(rows), config.pair.cell_documents)
    work.console.say(f"{len(rows)} documents to add, {len(left_out)} left out as copies by vector")
    (work.directory / INDEX).mkdir(exist_ok=True)
    ends = np.cumsum(added)
    parts = [rows[end - count : end] for end, count in zip(ends, added, strict=True)]
    left = [cell for cell in range(len(added)) if not facts_path(index_path(work.directory, cell)).is_file()]
    done = len(rows) - sum(added[cell] for cell in left)
    with work.console.task("documents indexed", len(rows), "documents", done=done) as task:
        for cell in left:
            _write_cell(config, kept, cell, new[parts[cell]], member.first + parts[cell], work.directory, task)
            work.keep_clock()
    write_members(work.directory, [*kept.members, member], kept.embedding)
    held = [*kept.cell_documents, *[0] * (len(added) - len(kept.cells))]
    work.record(
        documents=member.first + member.documents,
        added=len(rows),
        left_out=len(left_out),
        cells=[before + more for before, more in zip(held, added, strict=True)],
    )


def _left_out(kept: KeptIndex, new: Vectors, first: int, work: Work) -> np.ndarray:
    """The new documents that stay out, int64 ascending; written down, so that a killed run need not look for them again."""
    path = work.directory / LEFT_OUT
    if not path.is_file():
        rows, ids = equal_vectors(new, first, map(HnswIndex.load, kept.cells))
        with atomic_path(path) as temporary:
            pq.write_table(pa.table({"document": rows, "equal": ids}), temporary)
    return pq.read_table(path)["document"].to_numpy()


def equal_vectors(vectors: Vectors, first: int, indexes: Iterable[HnswIndex]) -> tuple[np.ndarray, np.ndarray]:
    """The vectors that equal one in an index or an earlier one of themselves, to the bit.

    Args:
        first: the id of the first vector; the ids of the others follow it, and those in the indexes are lower.

    Returns:
        Their rows, int64 ascending, and the lowest id that has each one's vector, int64.
    """
    digests = [digest for start in range(0, len(vectors), READ_BLOCK) for digest in _digests(_block(vectors, start))]
    lowest: dict[bytes, int] = {}
    for row, digest in enumerate(digests):
        lowest.setdefault(digest, first + row)
    for one in indexes:
        for ids, block in one.items():
            for id, digest in zip(ids.tolist(), _digests(block), strict=True):
                if digest in lowest:
                    lowest[digest] = min(id, lowest[digest])
    equal = np.array([lowest[digest] for digest in digests], dtype=np.int64)
    rows = np.flatnonzero(equal != first + np.arange(len(digests)))
    return rows, equal[rows]


def _block(vectors: Vectors, start: int) -> np.ndarray:
    return vectors[np.arange(start, min(start + READ_BLOCK, len(vectors)))]


def _digests(block: np.ndarray) -> Iterator[bytes]:
    return (xxhash.xxh3_128_digest(row.data) for row in block)


def share_out(held: Sequence[int], documents: int, capacity: int) -> list[int]:
    """How many of some documents each cell takes: cells with the fewest are filled first, then new ones are begun.

    Args:
        held: what each cell has.
        capacity: what a cell may have; one that has more takes none.

    Returns:
        For each cell, and for each new one after them.
    """
    added = [0] * len(held)
    for cell in np.argsort(held, kind="stable").tolist():
        added[cell] = min(max(capacity - held[cell], 0), documents)
        documents -= added[cell]
    return added + [min(capacity, documents - start) for start in range(0, documents, capacity)]


def _write_cell(
    config: RunConfig, kept: KeptIndex, cell: int, vectors: np.ndarray, ids: np.ndarray, directory: Path, task: Task
) -> None:
    path, settings = index_path(directory, cell), config.pair
    if cell >= len(kept.cells):
        links, construction = settings.hnsw_links, settings.hnsw_construction
        HnswIndex.build(vectors, ids, links=links, construction=construction, seed=config.seed, task=task).save(path)
    elif len(ids):
        grown = HnswIndex.load(kept.cells[cell])
        grown.add(vectors, ids, task)
        grown.save(path)
    else:
        for source, target in ((kept.cells[cell], path), (facts_path(kept.cells[cell]), facts_path(path))):
            link(source, target)
