"""Which of the documents that were read stay, and where: ids used once, originals held out whole, exact copies dropped.

All of it is decided on hashes, a run of them at a time, so that memory does not grow with the corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from sbp_fast.config import CorpusConfig
from sbp_fast.data.documents import Document, File, read_file
from sbp_fast.data.shuffle import KEY_BITS, Spill, hash_name
from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import save_array

MINIMUM_HELDOUT = 8
SORTED_AT_ONCE = 1 << 24  # hashes
FACTS = ("high", "low", "number", "original", "head", "heldout")


def check_ids(spill: Spill, documents: int, files: Sequence[tuple[File, bool]], config: CorpusConfig, seed: int) -> None:
    """Refuse an id that two documents have, of those to train on or of those to be held out.

    Raises:
        UserError: naming both records.
    """
    for heldout in (False, True):
        for low, high in hash_runs(documents):
            found = np.sort(np.concatenate([np.zeros(0, np.uint64), *_record_ids(spill, heldout, low, high)]))
            for digest in np.unique(found[1:][found[1:] == found[:-1]]).tolist():
                _refuse_repeated(digest, [file for file, kind in files if kind == heldout], config, seed)


def hash_runs(documents: int) -> list[tuple[int, int]]:
    """Ranges of 64-bit hashes with about `SORTED_AT_ONCE` of them each."""
    count = -(-documents // SORTED_AT_ONCE) or 1
    edges = [(number << KEY_BITS) // count for number in range(count + 1)]
    return [(low, high - 1) for low, high in pairwise(edges)]


def _record_ids(spill: Spill, heldout: bool, low: int, high: int) -> Iterator[np.ndarray]:
    """The hashed ids of records, once for each record, from `low` to `high`."""
    for facts in spill.facts(("original", "passage", "heldout")):
        ids = facts["original"][(facts["passage"] <= 0) & (facts["heldout"] == heldout)]
        yield ids[(ids >= np.uint64(low)) & (ids <= np.uint64(high))]


def _refuse_repeated(digest: int, files: Iterable[File], config: CorpusConfig, seed: int) -> None:
    """Read again to name the two records; two ids that merely have one hash are no mistake."""
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
    """What was decided about all documents, as sorted arrays of uint64.

    Attributes:
        sources: the hashed names of the sources: the head of an id that merely names one is no original.
        heldout: the hashed names of the originals set apart.
        near_copies: the numbers of the documents left out as near-copies of others.
    """

    sources: np.ndarray
    heldout: np.ndarray
    near_copies: np.ndarray

    @staticmethod
    def none() -> Decisions:
        """Where the held-out documents were given."""
        return Decisions(*[np.zeros(0, np.uint64)] * len(fields(Decisions)))

    @staticmethod
    def load(directory: Path) -> Decisions:
        return Decisions(*(np.load(directory / f"{field.name}.npy") for field in fields(Decisions)))

    def save(self, directory: Path) -> None:
        """Keep them for the processes that write."""
        for field in fields(self):
            save_array(directory / f"{field.name}.npy", getattr(self, field.name))

    def of(self, facts: Mapping[str, np.ndarray]) -> np.ndarray:
        """The hashed name of each document's original. uint64 [documents]"""
        return np.where(np.isin(facts["head"], self.sources), facts["original"], facts["head"])

    def held(self, facts: Mapping[str, np.ndarray]) -> np.ndarray:
        """Whether each document is to be held out. bool [documents]"""
        return facts["heldout"] | np.isin(self.of(facts), self.heldout)


def set_apart(spill: Spill, documents: int, sources: Iterable[str], share: float, seed: int) -> Decisions:
    """Choose originals with `share` of the documents for evaluation, whole originals together.

    Originals are drawn in the order of the keyed hash of their names; one too large for what is still wanted is passed over.

    Raises:
        UserError: if the originals are too few or too large for that.
    """
    nothing = np.zeros(0, np.uint64)
    sorted_sources = np.array(sorted(hash_name(source, seed) for source in sources), np.uint64)
    decisions = replace(Decisions.none(), sources=sorted_sources)
    wanted = max(MINIMUM_HELDOUT, round(share * documents))
    chosen: list[int] = []
    left, count = wanted, 0
    for low, high in hash_runs(documents):
        found = [nothing]
        for facts in spill.facts(("original", "head", "passage")):
            names = decisions.of(facts)[facts["passage"] <= 0]
            found.append(names[(names >= np.uint64(low)) & (names <= np.uint64(high))])
        names, sizes = np.unique(np.concatenate(found), return_counts=True)
        count += len(names)
        for name, size in zip(names.tolist(), sizes.tolist(), strict=True):
            if size <= left:
                chosen.append(name)
                left -= size
    if wanted - left < min(MINIMUM_HELDOUT, documents):
        raise UserError(
            "corpus",
            f"its {documents} documents belong to {count} originals, too large to set {wanted} documents apart",
            'name held-out documents in corpus.heldout, or set corpus.group_separator="" if ids do not name originals',
        )
    return replace(decisions, heldout=np.array(chosen, np.uint64))


@dataclass(frozen=True)
class Selection:
    """Of the documents of a part, the rows to train on and those held out, each in the shuffled order.

    Attributes:
        copies: documents left out for one to train on with the same text.
        heldout_copies: left out because the same text is held out.
        near_copies: left out, of either kind, because a text like theirs stays.
    """

    train: np.ndarray
    heldout: np.ndarray
    copies: int
    heldout_copies: int
    near_copies: int


def select(facts: Mapping[str, np.ndarray], decisions: Decisions) -> Selection:
    """Of documents with the same text the one held out stays, else the first that was read."""
    held = decisions.held(facts)
    order = np.lexsort((facts["number"], ~held, facts["low"], facts["high"]))
    high, low, held = facts["high"][order], facts["low"][order], held[order]
    first = np.ones(len(order), bool)
    first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    text = np.cumsum(first) - 1  # which of the texts each document has
    training = np.bincount(text[~held], minlength=int(first.sum()))
    near = first & np.isin(facts["number"][order], decisions.near_copies)
    return Selection(
        train=order[first & ~held & ~near],
        heldout=order[first & held & ~near],
        copies=int(np.maximum(training - 1, 0).sum()),
        heldout_copies=int(np.count_nonzero(training[held[first]])),
        near_copies=int(near.sum()),
    )
