"""What `prepare` wrote, opened."""

from __future__ import annotations

from pathlib import Path

from sbp_fast.data.documents import group_of
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.data.tokenizer import Tokenizer
from sbp_fast.pipeline.stage import Manifest


class PreparedCorpus:
    """A prepared corpus directory.

    Attributes:
        train: every document, globally shuffled; what the oracle may read.
        unique: the head of `train`, a uniform random subset; what the baseline and SBP may read.
        heldout: documents for evaluation alone.
        tokenizer: trained on `unique`, or the one that the configuration named.
        embedded: whether the documents are the ones that come with the package.
        manifest: of the stage.

    Raises:
        UserError: no finished output of `prepare`, or a damaged one as far as sizes tell: what reads one in a stage has had it
            hashed by `run_stage`, once for all of its processes.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = Manifest.load(self.directory, "prepare", hashed=False)
        self.train = Corpus(self.directory / "train")
        self.unique: Corpus = self.train.prefix(self.manifest.counts["unique_documents"])
        self.heldout = Corpus(self.directory / "heldout")
        self.tokenizer = Tokenizer(self.directory / "tokenizer.json")
        self.embedded: bool = self.manifest.counts["embedded"]

    def text(self, corpus: Corpus, document: int) -> str:
        """The text of one document of `corpus`."""
        return self.tokenizer.decode(corpus[document])

    def group(self, id: str) -> str:
        """The original that a document is part of, by its id (see `group_of`)."""
        return group_of(id, self.manifest.config["corpus"]["group_separator"], self.manifest.counts["sources"])
