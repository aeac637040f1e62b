"""The stage `stitch`: documents that belong together, joined to documents of up to a context."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sbp_fast.config import RunConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.data.token_shards.stitch import stitch_documents
from sbp_fast.pairs.chain import related_order
from sbp_fast.pairs.pairset import PairSet
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage


def stitch(
    config: RunConfig,
    out: Path,
    *,
    corpus: Path,
    pairs: Path | None = None,
    synthetic: Path | None = None,
    console: Console,
    force: bool = False,
) -> Manifest:
    """Join unique documents along a path through related ones, or synthetic documents with others of the same seed.

    Args:
        config: of the run; a joined document has at most `model.context` tokens.
        out: directory of the output, a corpus.
        corpus: output of `prepare`.
        pairs: output of `pair`: join the unique documents (see `related_order`).
        synthetic: output of `filter`: join its documents.
        console: for progress.
        force: replace an output that was made from other settings or inputs.

    Raises:
        ValueError: both or neither of `pairs` and `synthetic`.
        UserError: an input is not finished.
    """
    if (pairs is None) == (synthetic is None):
        raise ValueError("stitch takes pairs or synthetic documents")

    def body(context: StageContext) -> None:
        if pairs is not None:
            documents, related = PreparedCorpus(corpus).unique, PairSet(pairs)
            order, begins = related_order(len(documents), related.seeds, related.partners)
        else:
            documents = Corpus(context.inputs["synthetic"])
            order, begins = _by_seed(documents.column("seed"))
        joined = stitch_documents(documents, order, begins, config.model.context, context.directory)
        context.console.say(f"{len(documents)} documents joined to {joined}")
        context.record(parts=len(documents), documents=joined, tokens=documents.tokens)

    given = {"corpus": corpus, "pairs": pairs, "synthetic": synthetic}
    return run_stage(
        "stitch",
        out,
        config={"longest": config.model.context},
        inputs={name: path for name, path in given.items() if path is not None},
        body=body,
        console=console,
        force=force,
    )


def _by_seed(seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the documents in the order of their seeds, int64, and whether each is the first of its seed, bool."""
    order = np.argsort(seeds, kind="stable")
    return order, np.diff(seeds[order], prepend=-2) != 0
