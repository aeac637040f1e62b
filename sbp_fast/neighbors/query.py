"""Queries of a saved index: the documents nearest to a text, or to one of the documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sbp_fast.config import RunConfig, resolve_device, resolve_threads
from sbp_fast.config.embed import OF_ENDPOINT, OF_FILE
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.neighbors.encoders import open_encoder
from sbp_fast.neighbors.hnsw import HnswIndex
from sbp_fast.neighbors.saved_index import SavedIndex
from sbp_fast.neighbors.vectors import Vectors

EF_SEARCH = 256  # size of the candidate list; a single query may be thorough


@dataclass(frozen=True)
class Neighbor:
    """A document of `corpus` near to a query, with its whole text."""

    id: str
    similarity: float
    text: str
    corpus: Path


def find_neighbors(
    config: RunConfig,
    index: Path,
    *,
    corpora: Sequence[Path],
    vectors: Sequence[Path] = (),
    text: str = "",
    document: str = "",
    count: int = 10,
) -> list[Neighbor]:
    """Find the documents nearest to a text or to another document, nearest first; one document stands for its duplicates.

    Args:
        config: for the device and threads, and the model that may be loaded, which has to be the one that the index names, or
            the server that has it; otherwise a text is encoded as the documents were.
        index: output of `pair` with an index, or of `index`.
        corpora: all those whose documents are in the index, in any order.
        vectors: output of `embed` on the corpus that has `document`; on others, too, if at hand.
        text: to search for; either this or `document`.
        document: id of a unique document.
        count: documents to return.

    Raises:
        UserError: no index, a damaged one, inputs that the index was not made from, an unknown id, a server that refuses.
        TransientError: a server that does not answer.
    """
    if bool(text) == bool(document):
        raise UserError("options", "do not say what to look for", "give one of --text and --document")
    saved = SavedIndex(index)
    corpus_directories, vector_directories = saved.match(corpora, "corpus"), saved.match(vectors, "vectors")
    opened = [PreparedCorpus(saved.require(corpus_directories, number, "corpus")) for number in range(len(saved.corpora))]
    own = -1
    if document:
        number, row = _find_document(opened, document)
        own = saved.corpora[number].first + row
        query = Vectors(saved.require(vector_directories, number, "vectors"))[np.array([row])]
    else:
        query = _encode(config, saved, text)
    best: dict[int, float] = {}
    for partition in saved.partitions:
        ids, similarities = HnswIndex.load(partition).search(query, count + 1, ef_search=EF_SEARCH, threads=1)
        best |= zip(ids[0].tolist(), similarities[0].tolist(), strict=True)
    best.pop(own, None)
    nearest = sorted(best.items(), key=lambda item: (-item[1], item[0]))[:count]
    return [_open_document(saved, opened, id, similarity) for id, similarity in nearest]


def _encode(config: RunConfig, saved: SavedIndex, text: str) -> np.ndarray:
    """Return the vector of a text, embedded as the index's documents were. float32 [1, dimension]."""
    made, index, settings = saved.embedding, saved.directory, config.embed
    name = made.model.removeprefix(OF_ENDPOINT)
    if made.model == OF_FILE:
        raise UserError(index, "was made from vectors of a file, which no text can be compared with", "give --document")
    if name != made.model:
        if not settings.endpoint:
            raise UserError(index, f"was made by {name} of a server", "give --endpoint with the server's URL, or --document")
        server = {"model": name, "endpoint": settings.endpoint, "endpoint_key_variable": settings.endpoint_key_variable}
        made = made.model_copy(update=server)
    elif settings.endpoint:
        raise UserError(index, f"was made with the model {name}, which no server had", "leave out --endpoint")
    elif name != settings.model:  # a model is code and a download: the user chooses it, not a file
        problem = f"was made with the model {name}, and {settings.model} is to be loaded"
        raise UserError(index, problem, f"give --model {name} if you trust that model")
    query = open_encoder(made, resolve_device(config), resolve_threads(config)).encode([text])
    if query.shape[1] != saved.dimension:
        problem = f"has vectors of {saved.dimension} components, and {name} now gives {query.shape[1]}"
        raise UserError(index, problem, "take the model or server that embedded its documents")
    return query


def _find_document(opened: list[PreparedCorpus], id: str) -> tuple[int, int]:
    """Return the corpus that has a unique document of this id, and the document's row in it."""
    matches = [
        (number, int(row))
        for number, prepared in enumerate(opened)
        for row in np.flatnonzero(np.asarray(prepared.unique.ids) == id)
    ]
    if not matches:
        directories = ", ".join(str(prepared.directory) for prepared in opened)
        raise UserError(f"document {id}", f"is not among the unique documents of {directories}", "give another id")
    if len(matches) > 1:
        directories = ", ".join(str(opened[number].directory) for number, _ in matches)
        raise UserError(f"document {id}", f"is in several corpora: {directories}", "give its text with --text")
    return matches[0]


def _open_document(saved: SavedIndex, opened: list[PreparedCorpus], id: int, similarity: float) -> Neighbor:
    number = saved.corpus_of(id)
    prepared, row = opened[number], id - saved.corpora[number].first
    return Neighbor(prepared.unique.id(row), similarity, prepared.text(prepared.unique, row), prepared.directory)
