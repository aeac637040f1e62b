"""Documents joined to longer ones, all of which a token may then see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numba import njit

from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.data.token_shards.writer import CorpusWriter


def stitch_documents(corpus: Corpus, order: np.ndarray, begins: np.ndarray, longest: int, directory: Path) -> int:
    """Write a corpus in which documents that follow each other are one document of at most `longest` tokens.

    Every document keeps its <begin> and <end>, so that a model reads the same texts as in `corpus`, with others before them. A
    document that does not fit begins the next one. One that is longer than `longest` stays alone.

    Args:
        corpus: the documents.
        order: int64 [documents], each once.
        begins: bool [documents], whether the document at this position of the order must not follow the one before it.
        longest: most tokens of a joined document.
        directory: to write; its documents have the id and source of their first part and the column "parts".

    Returns:
        Number of joined documents.
    """
    lengths, sizes = np.diff(corpus.offsets)[order], corpus.column("text_bytes")
    starts = np.flatnonzero(_starts(lengths, begins, longest))
    ids, sources, vocabulary_size = corpus.ids, corpus.sources, corpus.vocabulary_size
    writer = CorpusWriter(directory, vocabulary_size)
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(order)], strict=True):
        parts = order[start:end]
        first = int(parts[0])
        tokens = np.concatenate([corpus[document] for document in parts.tolist()])
        writer.add(tokens, id=ids[first], source=sources[first], text_bytes=int(sizes[parts].sum()), parts=len(parts))
    writer.close()
    return len(starts)


@njit(cache=True)
def _starts(lengths, begins, longest):  # type: ignore[no-untyped-def]
    """Return whether the document at each position of the order begins a joined one; bool [documents]."""
    starts = begins.copy()
    size = 0
    for position in range(len(lengths)):
        starts[position] = starts[position] or size + lengths[position] > longest
        size = lengths[position] if starts[position] else size + lengths[position]
    return starts
