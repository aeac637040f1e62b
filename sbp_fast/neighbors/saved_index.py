"""A saved nearest-neighbor index, as `pair` wrote it or as `index` extended it: its partitions, and whose documents it has."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from sbp_fast.config import EmbedConfig
from sbp_fast.errors import UserError
from sbp_fast.neighbors.hnsw import read_metadata
from sbp_fast.neighbors.vectors import Vectors
from sbp_fast.pipeline.files import read_json, write_json
from sbp_fast.pipeline.manifest import Manifest

INDEX, MEMBERS = "index", "members.json"
InputKind = Literal["corpus", "vectors"]
WRITTEN_BY = {"corpus": "prepare", "vectors": "embed"}


@dataclass(frozen=True)
class IndexedCorpus:
    """A corpus whose unique documents are in an index; document i of them has the id `first` + i."""

    corpus: str
    """Fingerprint of the output of `prepare`."""
    vectors: str
    """Fingerprint of the output of `embed`."""
    first: int
    documents: int
    """Of the corpus, with those that are left out of the index as duplicates."""

    @staticmethod
    def of(vectors: Vectors, first: int = 0) -> IndexedCorpus:
        """Return the corpus of these vectors, which must be all of its vectors."""
        return IndexedCorpus(vectors.manifest.inputs["corpus"], vectors.manifest.fingerprint, first, len(vectors))


class SavedIndex:
    """What is known of a saved index without loading it.

    Args:
        directory: output of `pair` with an index, or of `index`.
        hashed: whether to hash the files; false where `run_stage` has just done it.

    Attributes:
        corpora: whose documents are in the index, in the order of their ids.
        embedding: settings that its documents were embedded with.
        partitions: the files of the index, each a graph of its own.
        partition_documents: the number of documents in each.
        dimension: of its vectors.

    Raises:
        UserError: another stage's output, a damaged one, or one without an index.
    """

    def __init__(self, directory: Path, *, hashed: bool = True) -> None:
        self.directory = directory
        manifest = Manifest.load(directory, hashed=hashed)
        if manifest.stage not in ("pair", "index"):
            problem = f"holds the output of {manifest.stage}, not of pair or index"
            raise UserError(directory, problem, "give the right directory")
        self.partitions = sorted((directory / INDEX).glob("partition-*.hnsw"))
        if not self.partitions:
            remedy = "rerun pair with pair.save_index=true, or with pair.backend=hnsw"
            raise UserError(directory, "has no saved index", remedy)
        metadata = [read_metadata(partition) for partition in self.partitions]
        self.partition_documents = [int(partition["documents"]) for partition in metadata]
        self.dimension: int = metadata[0]["dimension"]
        if not (directory / MEMBERS).is_file():
            problem = "does not say whose documents are in its index"
            raise UserError(directory, problem, "rerun the stage that wrote it with --force")
        members = read_json(directory / MEMBERS)
        self.corpora = tuple(IndexedCorpus(**member) for member in members["members"])
        self.embedding = EmbedConfig.model_validate(members["embed"])

    def corpus_of(self, id: int) -> int:
        """Return which corpus has the document of this id, as an index into `corpora`."""
        return bisect_right([corpus.first for corpus in self.corpora], id) - 1

    def match(self, directories: Sequence[Path], kind: InputKind) -> dict[int, Path]:
        """Match directories with the corpora that they are, or are the vectors of.

        Returns:
            Index into `corpora` -> directory.

        Raises:
            UserError: a directory matches none.
        """
        fingerprints = [getattr(corpus, kind) for corpus in self.corpora]
        matched = {}
        for directory in directories:
            fingerprint = Manifest.load(directory, WRITTEN_BY[kind], hashed=False).fingerprint
            if fingerprint not in fingerprints:
                problem = f"not what the index in {self.directory} was made from"
                raise UserError(directory, problem, f"give the right --{kind}")
            matched[fingerprints.index(fingerprint)] = directory
        return matched

    def require(self, matched: dict[int, Path], corpus: int, kind: InputKind) -> Path:
        """Return the directory of one corpus among those that `match` matched.

        Raises:
            UserError: it is not among them.
        """
        if corpus not in matched:
            missing = self.corpora[corpus]
            problem = f"needs the {kind} with fingerprint {getattr(missing, kind)} ({missing.documents} documents) as well"
            raise UserError(self.directory, problem, f"give it with --{kind}")
        return matched[corpus]


def index_path(directory: Path, partition: int) -> Path:
    """Return the path of a partition's index in the output of `pair` or `index`."""
    return directory / INDEX / f"partition-{partition:05d}.hnsw"


def write_members(directory: Path, corpora: Sequence[IndexedCorpus], embedding: EmbedConfig) -> None:
    """Write whose documents are in the index of a directory, and the settings that they were embedded with."""
    members = {"embed": embedding.model_dump(mode="json"), "members": [asdict(corpus) for corpus in corpora]}
    write_json(directory / MEMBERS, members)


def embedding_of(vectors: Vectors) -> EmbedConfig:
    """Return the settings that vectors were embedded with."""
    return EmbedConfig.model_validate(vectors.manifest.config["embed"])
