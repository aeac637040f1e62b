"""The output of `prepare`, opened."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sbp_fast.data.documents import group_of
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.data.tokenizer import TOKENIZER, Tokenizer
from sbp_fast.pipeline.manifest import Manifest

VALIDATION = "validation.npy"


class PreparedCorpus:
    """A prepared corpus directory.

    Sizes of files are checked, not their checksums: `run_stage` hashes its inputs once for all processes of a stage. It can be
    pickled and is then opened again.

    Attributes:
        train: every training document, globally shuffled; what the oracle may read.
        unique: the head of `train`, a uniform random subset; what the baseline and SBP may read.
        heldout: the holdout split, validation and test documents together; no model is trained on any of them.
        tokenizer: trained on `unique`, or the one that the configuration named.
        counts: what `prepare` counted.
        fingerprint: of the whole output.
        embedded: whether the documents are the ones that come with the package.

    Raises:
        UserError: no finished output of `prepare`, or a damaged one as far as sizes tell.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        manifest = Manifest.load(self.directory, "prepare", hashed=False)
        self.counts: dict[str, Any] = manifest.counts
        self.fingerprint = manifest.fingerprint
        self._config = manifest.config
        self.train = Corpus(self.directory / "train")
        self.unique: Corpus = self.train.prefix(self.counts["unique_documents"])
        self.heldout = Corpus(self.directory / "heldout")
        self.tokenizer = Tokenizer(self.directory / TOKENIZER)
        self.embedded: bool = self.counts["embedded"]

    def __reduce__(self) -> tuple[type[PreparedCorpus], tuple[Path]]:
        return PreparedCorpus, (self.directory,)

    @cached_property
    def validation(self) -> np.ndarray:
        """Indices into `heldout` of the documents on which recipes and checkpoints are chosen. int64, rising."""
        return np.load(self.directory / VALIDATION)

    @cached_property
    def test(self) -> np.ndarray:
        """Indices into `heldout` of the documents that `evaluate` scores, and on which nothing is chosen. int64, rising."""
        return np.setdiff1d(np.arange(len(self.heldout)), self.validation)

    def text(self, corpus: Corpus, document: int) -> str:
        """Return the text of one document of `corpus`."""
        return self.tokenizer.decode(corpus[document])

    def group(self, id: str) -> str:
        """Return the original that a document is part of, by its id (see `group_of`)."""
        return group_of(id, self._config["corpus"]["group_separator"], self.counts["sources"])
