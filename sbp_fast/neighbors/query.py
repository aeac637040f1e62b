"""Asking an index that was kept: which documents are nearest to a text, or to one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sbp_fast.config import RunConfig, resolve_device, resolve_threads
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.neighbors.hnsw import HnswIndex
from sbp_fast.neighbors.saved_index import KeptIndex
from sbp_fast.neighbors.vectors import Vectors
from sbp_fast.stages.embed import Encoder

SEARCH = 256  # candidates held while an index is asked; a single question may be thorough


@dataclass(frozen=True)
class Neighbour:
    """A document of `corpus` near to what was asked for; `text` is the whole of it."""

    id: str
    similarity: float
    text: str
    corpus: Path


def neighbours(
    config: RunConfig,
    index: Path,
    *,
    corpora: Sequence[Path],
    vectors: Sequence[Path] = (),
    text: str = "",
    document: str = "",
    count: int = 10,
) -> list[Neighbour]:
    """The documents nearest to a text, or to a document but itself, nearest first; copies are answered by their representative.

    Args:
        config: for the device and threads alone; a text is encoded as the documents were.
        index: output of `pair` that kept an index, or of `index`.
        corpora: all those whose documents are in the index, in any order.
        vectors: what was embedded of the corpus that `document` is from; of others, too, if at hand.
        text, document: what to look for, or the id of a unique document; one of the two.

    Raises:
        UserError: no index, a damaged one, inputs that are not those of the index, an id that is not there.
    """
    if bool(text) == bool(document):
        raise UserError("options", "do not say what to look for", "give one of --text and --document")
    kept = KeptIndex(index)
    given, known = kept.sort(corpora, "corpus"), kept.sort(vectors, "vectors")
    opened = [PreparedCorpus(kept.require(given, place, "corpus")) for place in range(len(kept.members))]
    own = -1
    if document:
        place, row = _find(opened, document)
        own = kept.members[place].first + row
        query = Vectors(kept.require(known, place, "vectors"))[np.array([row])]
    else:
        query = Encoder(kept.embedding, resolve_device(config), resolve_threads(config)).encode([text])
    best: dict[int, float] = {}
    for cell in kept.cells:
        ids, similarities = HnswIndex.load(cell).ask(query, count + 1, search=SEARCH, threads=1)
        best |= zip(ids[0].tolist(), similarities[0].tolist(), strict=True)
    best.pop(own, None)
    nearest = sorted(best.items(), key=lambda item: (-item[1], item[0]))[:count]
    return [_show(kept, opened, id, similarity) for id, similarity in nearest]


def _find(opened: list[PreparedCorpus], id: str) -> tuple[int, int]:
    """Which corpus has a unique document of this id, and its row there."""
    found = [(place, int(row)) for place, one in enumerate(opened) for row in np.flatnonzero(np.asarray(one.unique.ids) == id)]
    if not found:
        directories = ", ".join(str(prepared.directory) for prepared in opened)
        raise UserError(f"document {id}", f"is not among the unique documents of {directories}", "give another id")
    if len(found) > 1:
        directories = ", ".join(str(opened[place].directory) for place, _ in found)
        raise UserError(f"document {id}", f"is in several corpora: {directories}", "give its text with --text")
    return found[0]


def _show(kept: KeptIndex, opened: list[PreparedCorpus], id: int, similarity: float) -> Neighbour:
    place = kept.member_of(id)
    prepared, row = opened[place], id - kept.members[place].first
    return Neighbour(prepared.unique.id(row), similarity, prepared.text(prepared.unique, row), prepared.directory)
