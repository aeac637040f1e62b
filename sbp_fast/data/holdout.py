"""The selection of documents: ids used once, originals held out whole, exact duplicates dropped.

All of it is decided on hashes, one range of them at a time, so that memory does not grow with the corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from sbp_fast.config import CorpusConfig
from sbp_fast.data.documents import Document, read_file
from sbp_fast.data.readers import InputFile
from sbp_fast.data.shuffle import KEY_BITS, ShuffleReader, hash_name
from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import save_array

MINIMUM_HELDOUT = 8
MINIMUM_PART = 2  # documents for validation and for testing, each; intervals resample them
HASHES_IN_MEMORY = 1 << 24
SELECTION_COLUMNS = ("key", "key_low", "index", "id_hash", "head_hash", "heldout")


def check_ids(
    shuffled: ShuffleReader, documents: int, files: Sequence[tuple[InputFile, bool]], config: CorpusConfig, seed: int
) -> None:
    """Refuse an id that two training documents or two held-out documents share.

    Args:
        shuffled: the documents.
        documents: their number.
        files: each input file, and whether its documents are held out.
        config: how the files are read.
        seed: of the hashes.

    Raises:
        UserError: naming both records.
    """
    for heldout in (False, True):
        for low, high in hash_ranges(documents):
            hashes = np.sort(np.concatenate([np.zeros(0, np.uint64), *_record_ids(shuffled, heldout, low, high)]))
            for digest in np.unique(hashes[1:][hashes[1:] == hashes[:-1]]).tolist():
                _refuse_repeated(digest, [file for file, kind in files if kind == heldout], config, seed)


def hash_ranges(count: int) -> list[tuple[int, int]]:
    """Return inclusive ranges of 64-bit hashes that hold about `HASHES_IN_MEMORY` of `count` hashes each."""
    ranges = -(-count // HASHES_IN_MEMORY) or 1
    edges = [(index << KEY_BITS) // ranges for index in range(ranges + 1)]
    return [(low, high - 1) for low, high in pairwise(edges)]


def _record_ids(shuffled: ShuffleReader, heldout: bool, low: int, high: int) -> Iterator[np.ndarray]:
    """Yield the hashed ids from `low` to `high`, once for each record."""
    for columns in shuffled.columns(("id_hash", "passage", "heldout")):
        ids = columns["id_hash"][(columns["passage"] <= 0) & (columns["heldout"] == heldout)]
        yield ids[(ids >= np.uint64(low)) & (ids <= np.uint64(high))]


def _refuse_repeated(digest: int, files: Iterable[InputFile], config: CorpusConfig, seed: int) -> None:
    """Read the files again to name the two records; two different ids of equal hash are no mistake."""
    seen: dict[str, str] = {}
    documents = (item for file in files for item in read_file(file, config) if isinstance(item, Document))
    for document in documents:
        if hash_name(document.id, seed) != digest:
            continue
        if document.id in seen:
            raise UserError(
                document.where,
                f"the id {document.id!r} stands also in {seen[document.id]}",
                "give every document its own id, or set corpus.id_field to a field that holds one",
            )
        seen[document.id] = document.where


@dataclass(frozen=True)
class Decisions:
    """What was decided about the whole corpus, as sorted uint64 arrays.

    Attributes:
        sources: hashed names of the sources. The head of an id that is merely the name of a source is no original.
        heldout: hashed names of the originals in the holdout split.
        near_duplicates: `index` of the documents left out as near-duplicates of others.
    """

    sources: np.ndarray
    heldout: np.ndarray
    near_duplicates: np.ndarray

    @staticmethod
    def of_sources(sources: Iterable[str], seed: int) -> Decisions:
        """Return decisions that hold nothing out beyond the documents that were given for it."""
        empty = np.zeros(0, np.uint64)
        return Decisions(np.array(sorted(hash_name(source, seed) for source in sources), np.uint64), empty, empty)

    @staticmethod
    def load(directory: Path) -> Decisions:
        """Read what `save` wrote."""
        return Decisions(*(np.load(directory / f"{field.name}.npy") for field in fields(Decisions)))

    def save(self, directory: Path) -> None:
        """Write the arrays for the processes that tokenize."""
        for field in fields(self):
            save_array(directory / f"{field.name}.npy", getattr(self, field.name))

    def originals(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the hashed name of each document's original. uint64 [documents]."""
        return np.where(np.isin(columns["head_hash"], self.sources), columns["id_hash"], columns["head_hash"])

    def is_heldout(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return whether each document belongs to the holdout split. bool [documents]."""
        return columns["heldout"] | np.isin(self.originals(columns), self.heldout)


def count_originals(shuffled: ShuffleReader, documents: int, decisions: Decisions) -> dict[str, int]:
    """Count what the grouping of ids joins.

    Returns:
        "joined_documents", those that share their original with another one; "joined_originals", the originals of these;
        "largest_original", the documents of the largest.
    """
    counts = {"joined_documents": 0, "joined_originals": 0, "largest_original": 0}
    for low, high in hash_ranges(documents):
        sizes = _original_sizes(shuffled, decisions, low, high)[1]
        joined = sizes[sizes > 1]
        counts["joined_documents"] += int(joined.sum())
        counts["joined_originals"] += len(joined)
        counts["largest_original"] = max(counts["largest_original"], int(sizes.max(initial=0)))
    return counts


def _original_sizes(shuffled: ShuffleReader, decisions: Decisions, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashed names of the originals from `low` to `high`, rising, and the number of records of each."""
    parts = [np.zeros(0, np.uint64)]
    for columns in shuffled.columns(("id_hash", "head_hash", "passage")):
        names = decisions.originals(columns)[columns["passage"] <= 0]
        parts.append(names[(names >= np.uint64(low)) & (names <= np.uint64(high))])
    names, sizes = np.unique(np.concatenate(parts), return_counts=True)
    return names, sizes


def choose_holdout(shuffled: ShuffleReader, documents: int, sources: Iterable[str], share: float, seed: int) -> Decisions:
    """Choose originals with about `share` of the documents for evaluation, whole originals together.

    Originals are taken in the order of the keyed hash of their names; one that is larger than what is still missing is passed
    over.

    Raises:
        UserError: the originals are too few or too large.
    """
    decisions = Decisions.of_sources(sources, seed)
    wanted = max(MINIMUM_HELDOUT, round(share * documents))
    chosen: list[int] = []
    missing, originals = wanted, 0
    for low, high in hash_ranges(documents):
        names, sizes = _original_sizes(shuffled, decisions, low, high)
        originals += len(names)
        for name, size in zip(names.tolist(), sizes.tolist(), strict=True):
            if size <= missing:
                chosen.append(name)
                missing -= size
    if wanted - missing < min(MINIMUM_HELDOUT, documents):
        raise UserError(
            "corpus",
            f"its {documents} documents belong to {originals} originals, too large to hold {wanted} documents out",
            'name held-out documents in corpus.heldout, or set corpus.group_separator="" if ids do not name originals',
        )
    return replace(decisions, heldout=np.array(chosen, np.uint64))


def choose_validation(originals: np.ndarray, share: float) -> np.ndarray:
    """Choose the validation documents among the held-out ones, whole originals together; the others are for testing.

    Originals are taken in the order of the keyed hash of their names; one that is larger than what is still missing is passed
    over.

    Args:
        originals: uint64 [held-out documents], the hashed name of each document's original.
        share: share of the documents that is for validation.

    Returns:
        Indices of the validation documents, int64, rising.

    Raises:
        UserError: the originals are too few or too large for two parts.
    """
    names, document_original, sizes = np.unique(originals, return_inverse=True, return_counts=True)
    missing = round(share * len(originals))
    chosen = np.zeros(len(names), bool)
    for index, size in enumerate(sizes.tolist()):
        chosen[index] = size <= missing
        missing -= size if chosen[index] else 0
    validation = np.flatnonzero(chosen[document_original])
    test_documents = len(originals) - len(validation)
    if min(len(validation), test_documents) < MINIMUM_PART:
        raise UserError(
            "corpus.validation_share",
            f"{len(originals)} held-out documents, of {len(names)} originals, at a share of {share:g} make {len(validation)} "
            f"for validation and {test_documents} for testing, fewer than {MINIMUM_PART}",
            'hold out more documents, change the share, or set corpus.group_separator="" if ids do not name originals',
        )
    return validation


@dataclass(frozen=True)
class Selection:
    """The rows of a partition that stay, each split in the shuffled order, and how many were dropped.

    Attributes:
        train: rows of the training split. int64
        heldout: rows of the holdout split. int64
        duplicates: training documents dropped for another one with the same text.
        heldout_duplicates: training documents dropped because the same text is held out.
        near_duplicates: documents of either split dropped because a text like theirs stays.
    """

    train: np.ndarray
    heldout: np.ndarray
    duplicates: int
    heldout_duplicates: int
    near_duplicates: int


def select(columns: Mapping[str, np.ndarray], decisions: Decisions) -> Selection:
    """Select the documents of a partition: of those with the same text the held-out one, else the first that was read.

    Args:
        columns: SELECTION_COLUMNS of the partition.
        decisions: about the whole corpus.
    """
    heldout = decisions.is_heldout(columns)
    order = np.lexsort((columns["index"], ~heldout, columns["key_low"], columns["key"]))
    key, key_low, heldout = columns["key"][order], columns["key_low"][order], heldout[order]
    first = np.ones(len(order), bool)
    first[1:] = (key[1:] != key[:-1]) | (key_low[1:] != key_low[:-1])
    text = np.cumsum(first) - 1  # which of the texts each document has
    training = np.bincount(text[~heldout], minlength=int(first.sum()))
    near = first & np.isin(columns["index"][order], decisions.near_duplicates)
    return Selection(
        train=order[first & ~heldout & ~near],
        heldout=order[first & heldout & ~near],
        duplicates=int(np.maximum(training - 1, 0).sum()),
        heldout_duplicates=int(np.count_nonzero(training[heldout[first]])),
        near_duplicates=int(near.sum()),
    )
