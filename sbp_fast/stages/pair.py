"""The stage `pair`: ordered pairs (seed, partner) of documents that are related but not duplicates."""

from __future__ import annotations

import shutil
from pathlib import Path

from sbp_fast.config import RunConfig
from sbp_fast.data.input_files import fingerprint_sources, search_files
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import TransientError, UserError
from sbp_fast.neighbors.backends import check_backend
from sbp_fast.neighbors.saved_index import INDEX, IndexedCorpus, embedding_of, write_members
from sbp_fast.neighbors.vectors import Vectors
from sbp_fast.pairs.document_statistics import DistinctDocuments
from sbp_fast.pairs.find import find_pairs
from sbp_fast.pairs.find_heldout import find_heldout_pairs
from sbp_fast.pairs.imported import import_pairs
from sbp_fast.pipeline.executors.executor import Workers
from sbp_fast.pipeline.executors.local import LOCAL
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage


def pair(
    config: RunConfig,
    corpus: Path,
    vectors: Path | None,
    out: Path,
    *,
    console: Console,
    force: bool = False,
    workers: Workers = LOCAL,
) -> Manifest:
    """Find the related pairs among the unique documents of a prepared corpus, and by the same criteria among held-out ones.

    One document of each cluster of duplicates takes part. A pair qualifies if either document is among the other's
    `pair.neighbors` nearest, their similarity is in the band, they belong to different originals, and neither has more than
    `pair.near_duplicate_containment` of its shingles in the other; then the degree caps apply. Every pair is taken in both
    directions (Yang et al., 2025, section 2: all ordered pairs above a threshold).

    With `pair.file`, the pairs are those of a file instead, `vectors` is None, and nothing but the first two files is written.

    Writes `pairs.parquet`, `heldout-pairs.parquet`, `duplicates.parquet`, `examples.json` and, where an index is saved,
    `index/` and `members.json`. In the manifest, `candidates`, `pairs` and `dropped` count ordered pairs, `duplicates`
    documents; `heldout` has the counts of `find_heldout_pairs`.

    Raises:
        UserError: `pair.backend` is unknown, the vectors belong to another corpus, there are too few documents or no pair in
            the band, or `pair.target_recall` is not reached; what `import_pairs` refuses; vectors beside `pair.file`, or none
            without it.
    """
    if config.pair.file:
        return _import(config, corpus, vectors, out, console=console, force=force)
    if vectors is None:
        raise UserError("pair", "needs --vectors", "give the output of embed, --pairs to shuffle, or known pairs in pair.file")
    check_backend(config.pair)

    def body(context: StageContext) -> None:
        _check_match(corpus, vectors)
        try:
            _pair(config, corpus, vectors, context, workers)
        except TransientError:
            raise
        except UserError:  # corrected settings give another index
            shutil.rmtree(context.directory / INDEX, ignore_errors=True)
            raise

    return run_stage(
        "pair",
        out,
        config={"pair": config.pair.settings(), "seed": config.seed},
        inputs={"corpus": corpus, "vectors": vectors},
        body=body,
        console=console,
        force=force,
    )


def _import(config: RunConfig, corpus: Path, vectors: Path | None, out: Path, *, console: Console, force: bool) -> Manifest:
    if vectors is not None:
        raise UserError("pair", "does not read --vectors with pair.file", "leave out one of them")

    def body(context: StageContext) -> None:
        for line in search_files(config.pair.file).describe():
            context.console.say(line)
        context.record(**import_pairs(config, PreparedCorpus(corpus), context.directory))
        context.console.say(f"{context.counts['pairs']} known pairs, {context.counts['seeds']} documents have a partner")

    inputs: dict[str, Path | str] = {"corpus": corpus, "pairs": fingerprint_sources(config.pair.file)}
    return run_stage("pair", out, config={"seed": config.seed}, inputs=inputs, body=body, console=console, force=force)


def _pair(config: RunConfig, corpus: Path, vectors: Path, context: StageContext, workers: Workers) -> None:
    prepared = PreparedCorpus(corpus)
    embedded = Vectors(vectors, hashed=False, corpus=prepared.unique)
    documents = DistinctDocuments.load(prepared, embedded, config.pair, context.scratch)
    result = find_pairs(
        config,
        documents,
        context.directory,
        context.scratch,
        workers=workers,
        console=context.console,
        checkpoint=context.save_clock,
    )
    context.device = result.device
    low = result.counts["band"]["low"]
    heldout, counts = find_heldout_pairs(config, prepared, vectors, low, context.scratch, context.console)
    heldout.write(context.directory)
    context.record(**result.counts, heldout=counts, encoder=embedding_of(embedded).model)
    if (context.directory / INDEX).is_dir():
        write_members(context.directory, [IndexedCorpus.of(embedded)], embedding_of(embedded))


def _check_match(corpus: Path, vectors: Path) -> None:
    fingerprint = Manifest.load(corpus, "prepare", hashed=False).fingerprint
    if Manifest.load(vectors, "embed", hashed=False).inputs["corpus"] != fingerprint:
        raise UserError(vectors, f"not the vectors of {corpus}", "run embed on this corpus first")
