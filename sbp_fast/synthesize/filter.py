"""The stage `filter`: sound synthetic documents are kept, and of each other one the reason is recorded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sbp_fast.config import FilterConfig, RunConfig
from sbp_fast.corpus.prepared import PreparedCorpus
from sbp_fast.corpus.shards import Corpus, CorpusWriter
from sbp_fast.errors import UserError
from sbp_fast.files import atomic_path, read_json
from sbp_fast.progress import Console
from sbp_fast.stage import MANIFEST, Manifest, Work, run_stage
from sbp_fast.synthesize.quality import Measures, measure_quality

REASONS = ("too_short", "unfinished", "repetition", "copies_seed", "copies_corpus", "duplicate")
"""Why a document goes, in the order of precedence: it is counted under the first that applies."""
REJECTED = "rejected.parquet"


def filter_documents(
    config: RunConfig, out: Path, *, corpus: Path, synthetic: Path, pairs: Path, console: Console, force: bool = False
) -> Manifest:
    """Write the kept documents of `synthetic` as a corpus of the same columns, and `rejected.parquet` with the others.

    Args:
        corpus: output of `prepare`.
        synthetic: output of `synthesize` on it.
        pairs: output of `pair` on it; the low end of its band tells a related document from an unrelated one.

    Raises:
        UserError: inputs that do not belong together; a filter that keeps nothing.
    """

    def body(work: Work) -> None:
        made_from = read_json(synthetic / MANIFEST)["inputs"]["corpus"]
        if made_from != Manifest.load(corpus, "prepare", hashed=False).fingerprint:
            raise UserError(synthetic, f"was not made from {corpus}", "give the corpus that it was made from")
        prepared, written = PreparedCorpus(corpus), Corpus(synthetic)
        measures = Measures.of(written, prepared.unique, config.filter)
        reasons = judge(measures, config.filter)
        kept = np.flatnonzero(reasons == "")
        counts = dict(sorted(Counter(reasons[reasons != ""].tolist()).items()))
        if not len(kept):
            found = ", ".join(f"{number} {reason}" for reason, number in counts.items())
            remedy = "tune the synthesizer for longer, or loosen the settings under filter."
            raise UserError(synthetic, f"no document passes the filters: {found}", remedy)
        tokens = _write(written, kept, reasons, work.directory)
        console.say(f"kept {len(kept)} of {len(written)} documents; rejected: {counts or 'none'}")
        work.record(documents=len(written), documents_kept=len(kept), tokens_kept=tokens, rejected=counts)
        low = Manifest.load(pairs, "pair", hashed=False).counts["band"]["low"]
        measure_quality(config, prepared, written, kept, measures, low, work)

    return run_stage(
        "filter",
        out,
        config={
            "seed": config.seed,
            "filter": config.filter.model_dump(mode="json"),
            "embed": config.embed.model_dump(mode="json"),
        },
        inputs={"corpus": corpus, "synthetic": synthetic, "pairs": pairs},
        body=body,
        console=console,
        force=force,
    )


def judge(measures: Measures, config: FilterConfig) -> np.ndarray:
    """Why each document goes, "" where it stays. str [documents]."""
    long_enough = measures.tokens >= config.shingle_tokens  # a shorter text has no shingles to be judged by
    faults = {
        "too_short": measures.tokens < config.minimum_tokens,
        "unfinished": ~measures.finished & (not config.keep_unfinished),
        "repetition": measures.repeated > config.maximum_repeated_shingles,
        "copies_seed": (measures.in_seed >= config.copy_containment) & long_enough,
        "copies_corpus": (measures.in_corpus >= config.copy_containment) & long_enough,
        "duplicate": ~measures.first,
    }
    return np.select([faults[reason] for reason in REASONS], REASONS, default="")


def _write(written: Corpus, kept: np.ndarray, reasons: np.ndarray, directory: Path) -> int:
    """Write the kept corpus and the table of the rejected; returns the tokens kept."""
    writer = CorpusWriter(directory, written.vocabulary_size)
    rows = written.documents.take(kept).to_pylist()
    for document, row in zip(kept.tolist(), rows, strict=True):
        columns = {name: value for name, value in row.items() if name != "tokens"}
        writer.add(written[document], **columns)
    rejected = np.flatnonzero(reasons != "")
    table = written.documents.take(rejected).select(["id", "seed", "sample", "tokens"])
    with atomic_path(directory / REJECTED) as temporary:
        pq.write_table(table.append_column("reason", pa.array(reasons[rejected].tolist(), pa.string())), temporary)
    return writer.close().tokens
