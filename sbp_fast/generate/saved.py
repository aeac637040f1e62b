"""The output of `synthesize`, opened."""

from __future__ import annotations

from pathlib import Path

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.errors import UserError
from sbp_fast.pipeline.manifest import Manifest

COLUMNS = frozenset({"seed", "sample", "stop", "mean_log_probability"})
"""Columns that a synthetic corpus has beside those of any corpus."""


def open_synthetic(directory: Path, prepared: PreparedCorpus) -> Corpus:
    """Open the documents that `synthesize` generated from a prepared corpus.

    Raises:
        UserError: they were made from something else, or by a version that did not record how each was made.
    """
    made_from = Manifest.read(directory).inputs.get("corpus")
    if made_from != prepared.fingerprint:
        raise UserError(directory, f"was not made from {prepared.directory}", "give the corpus that it was made from")
    synthetic = Corpus(directory)
    missing = COLUMNS - set(synthetic.column_names)
    if missing:
        problem = f"its documents have no {', '.join(sorted(missing))}"
        raise UserError(directory, problem, "make it again with this version of synthesize")
    return synthetic
