"""Corpora with given vectors, and an index of one as `pair` would have saved it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbp_fast.config import EmbedConfig
from sbp_fast.data.token_shards.writer import CorpusWriter
from sbp_fast.data.tokenizer import train_tokenizer
from sbp_fast.neighbors.hnsw import HnswIndex
from sbp_fast.neighbors.saved_index import IndexedCorpus, embedding_of, index_path, write_members
from sbp_fast.neighbors.vectors import Vectors, write_vectors
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage

QUIET = Console(quiet=True)
TOKENIZER = train_tokenizer(["a few words"], 300)


def make_member(directory: Path, vectors: np.ndarray, ids: Sequence[str] = (), **embed: Any) -> Path:
    """Outputs of `prepare` and `embed` in a directory: document i is NAME/i or ids[i], and says so."""
    named = ids or [f"{directory.name}/{row}" for row in range(len(vectors))]

    def write_corpus(context: StageContext) -> None:
        TOKENIZER.save(context.directory / "tokenizer.json")
        for part in ("train", "heldout"):
            writer = CorpusWriter(context.directory / part, TOKENIZER.vocabulary_size)
            for row, id in enumerate(named):
                tokens = TOKENIZER.encode(f"text of {directory.name}/{row}")
                writer.add([TOKENIZER.begin, *tokens, TOKENIZER.end], id=id, source="made", text_bytes=1)
            writer.close()
        context.record(unique_documents=len(vectors), embedded=False, sources={"made": len(vectors)})

    config = {"embed": EmbedConfig.model_validate(embed).model_dump(mode="json")}
    run_stage("prepare", directory / "corpus", config={}, inputs={}, body=write_corpus, console=QUIET)
    run_stage(
        "embed",
        directory / "vectors",
        config=config,
        inputs={"corpus": directory / "corpus"},
        body=lambda context: write_vectors(context.directory / "vectors-00000.npy", vectors, "float32"),
        console=QUIET,
    )
    return directory


def save_index(member: Path, partitions: Sequence[np.ndarray]) -> Path:
    """Write the output of `pair` on a member's vectors, with an index of the rows of each partition."""

    def body(context: StageContext) -> None:
        vectors = Vectors(member / "vectors")
        for number, rows in enumerate(partitions):
            path = index_path(context.directory, number)
            path.parent.mkdir(exist_ok=True)
            HnswIndex.build(vectors[rows], rows, m=16, ef_construction=200, seed=0).save(path)
        write_members(context.directory, [IndexedCorpus.of(vectors)], embedding_of(vectors))
        context.record(documents=len(vectors))

    inputs = {"corpus": member / "corpus", "vectors": member / "vectors"}
    run_stage("pair", member / "pairs", config={}, inputs=inputs, body=body, console=QUIET)
    return member / "pairs"
