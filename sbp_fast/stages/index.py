"""The stage `index`: a saved index extended by the documents of another corpus."""

from __future__ import annotations

from pathlib import Path

from sbp_fast.config import RunConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.neighbors.extend_index import check_extension, extend_index
from sbp_fast.neighbors.saved_index import SavedIndex
from sbp_fast.neighbors.vectors import Vectors
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage

SETTINGS = {"partition_documents", "hnsw_m", "hnsw_ef_construction"}


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
    """Add the unique documents of a corpus to a saved index.

    A document whose vector equals one in the index, or an earlier one of its own corpus, is left out: many duplicates make a
    graph lose other documents. The rest go to the partition with the fewest documents until that has
    `pair.partition_documents`, then to the next, then to new partitions. A query searches all partitions, so any assignment
    would do; this one changes the fewest files. Unchanged files are links to those of `to`, or copies where the file system has
    no links.

    Writes `index/`, `members.json` and `left-out.parquet`.

    Args:
        config: `pair.partition_documents`, and for new partitions `pair.hnsw_m`, `pair.hnsw_ef_construction` and `seed`.
        to: output of `pair` with an index, or of an earlier `index`.
        corpus: output of `prepare` whose documents are added.
        vectors: output of `embed` on it, with the settings of those in the index.
        out: directory to write.
        console: for progress.
        force: replace an output that was made from other settings or inputs.

    Raises:
        UserError: there is no index, the corpus is already in it, or the vectors belong to another corpus or other settings.
    """

    def body(context: StageContext) -> None:
        saved, new = SavedIndex(to, hashed=False), Vectors(vectors, hashed=False, corpus=PreparedCorpus(corpus).unique)
        check_extension(saved, new, corpus, Manifest.load(corpus, "prepare", hashed=False).fingerprint)
        context.record(**extend_index(config, saved, new, context.directory, console=console, checkpoint=context.save_clock))

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
