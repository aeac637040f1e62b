"""The output of `prepare`, opened."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sbp_fast.data.documents import group_of
from sbp_fast.data.shuffle import hash_name
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.data.tokenizer import Tokenizer
from sbp_fast.pipeline.manifest import Manifest


class PreparedCorpus:
    """A prepared corpus directory.

    Sizes of files are checked, not their checksums: `run_stage` hashes its inputs once for all processes of a stage.

    Attributes:
        train: every training document, globally shuffled; what the oracle may read.
        unique: the head of `train`, a uniform random subset; what the baseline and SBP may read.
        heldout: the holdout split, for evaluation alone.
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
        self.tokenizer = Tokenizer(self.directory / "tokenizer.json")
        self.embedded: bool = self.counts["embedded"]

    # A stand-in until `prepare` itself divides the held-out documents.
    @property
    def validation(self) -> np.ndarray:
        """Held-out documents to choose recipes and checkpoints by. int64, indices into `heldout`."""
        return np.flatnonzero(~self._for_testing)

    @property
    def test(self) -> np.ndarray:
        """Held-out documents that only the report's figures come from. int64, indices into `heldout`."""
        return np.flatnonzero(self._for_testing)

    @cached_property
    def _for_testing(self) -> np.ndarray:
        return np.array([hash_name(self.group(str(id)), 1) % 2 == 1 for id in self.heldout.ids], bool)

    def text(self, corpus: Corpus, document: int) -> str:
        """Return the text of one document of `corpus`."""
        return self.tokenizer.decode(corpus[document])

    def group(self, id: str) -> str:
        """Return the original that a document is part of, by its id (see `group_of`)."""
        return group_of(id, self._config["corpus"]["group_separator"], self.counts["sources"])
