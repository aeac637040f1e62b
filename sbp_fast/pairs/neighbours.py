"""Asking the index that `pair` kept: which documents of the corpus are nearest to a text, or to one of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sbp_fast.config import EmbedConfig, RunConfig, resolve_device, resolve_threads
from sbp_fast.corpus.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.pairs.embed import Encoder
from sbp_fast.pairs.join.hnsw import HnswIndex
from sbp_fast.pairs.joined import INDEX
from sbp_fast.pairs.vectors import Vectors
from sbp_fast.stage import Manifest

SEARCH = 256  # candidates held while an index is asked; a single question may be thorough


@dataclass(frozen=True)
class Neighbour:
    """A document near to what was asked for; `text` is the whole of it."""

    id: str
    similarity: float
    text: str


def neighbours(
    config: RunConfig, pairs: Path, *, corpus: Path, vectors: Path, text: str = "", document: str = "", count: int = 10
) -> list[Neighbour]:
    """The documents nearest to a text, or to a document but itself, nearest first; copies are answered by their representative.

    Args:
        config: for the device and threads alone; a text is encoded as the corpus was.
        pairs: output of `pair` that kept an index.
        corpus, vectors: what `pair` read.
        text, document: what to look for, or the id of a unique document; one of the two.

    Raises:
        UserError: no index, a damaged one, inputs that are not those of the pairs, an id that is not there.
    """
    if bool(text) == bool(document):
        raise UserError("options", "do not say what to look for", "give one of --text and --document")
    prepared, known = PreparedCorpus(corpus), Vectors(vectors)
    inputs = Manifest.load(pairs, "pair").inputs
    for directory, found, name in ((corpus, prepared.manifest, "corpus"), (vectors, known.manifest, "vectors")):
        if inputs[name] != found.fingerprint:
            raise UserError(directory, f"not what the pairs in {pairs} were made from", f"give the right --{name}")
    own = _row(prepared, document) if document else -1
    query = known[np.array([own])] if document else _encode(config, known, text)
    paths = sorted((pairs / INDEX).glob("cell-*.hnsw"))
    if not paths:
        remedy = "rerun pair with pair.keep_index=true, or with pair.backend=hnswlib"
        raise UserError(pairs, "keeps no index", remedy)
    best: dict[int, float] = {}
    for path in paths:
        ids, similarities = HnswIndex.load(path).ask(query, count + 1, search=SEARCH, threads=1)
        best |= zip(ids[0].tolist(), similarities[0].tolist(), strict=True)
    best.pop(own, None)
    nearest = sorted(best.items(), key=lambda item: (-item[1], item[0]))[:count]
    unique = prepared.unique
    return [Neighbour(str(unique.ids[row]), similarity, prepared.text(unique, row)) for row, similarity in nearest]


def _row(prepared: PreparedCorpus, id: str) -> int:
    rows = np.flatnonzero(np.asarray(prepared.unique.ids) == id)
    if not len(rows):
        raise UserError(f"document {id}", f"is not among the unique documents of {prepared.directory}", "give another id")
    return int(rows[0])


def _encode(config: RunConfig, vectors: Vectors, text: str) -> np.ndarray:
    embedding = EmbedConfig.model_validate(vectors.manifest.config["embed"])
    return Encoder(embedding, resolve_device(config), resolve_threads(config)).encode([text])
