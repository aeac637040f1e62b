"""An index that a stage kept, as `pair` left it or as `index` added to it: its cells, and whose documents are in them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from sbp_fast.config import EmbedConfig
from sbp_fast.errors import UserError
from sbp_fast.neighbors.hnsw import facts_path
from sbp_fast.neighbors.partitioned_join import INDEX
from sbp_fast.neighbors.vectors import Vectors
from sbp_fast.pipeline.files import read_json, write_json
from sbp_fast.pipeline.stage import Manifest

MEMBERS = "members.json"
Input = Literal["corpus", "vectors"]
STAGES = {"corpus": "prepare", "vectors": "embed"}


@dataclass(frozen=True)
class Member:
    """A corpus whose unique documents an index has; it calls document i of them `first` + i."""

    corpus: str
    """Fingerprint of what `prepare` wrote."""
    vectors: str
    """Fingerprint of what `embed` wrote."""
    first: int
    documents: int
    """Those that stand for no id in the index, as copies, included."""

    @staticmethod
    def of(vectors: Vectors, first: int = 0) -> Member:
        """The one whose vectors these are, all of them."""
        return Member(vectors.manifest.inputs["corpus"], vectors.manifest.fingerprint, first, len(vectors))


class KeptIndex:
    """What is known of an index without loading it.

    Args:
        directory: output of `pair` that kept an index, or of `index`.
        hashed: whether to hash the files; false where `run_stage` has just done it.

    Attributes:
        members: the corpora in the index, in the order of their ids.
        embedding: what its documents were embedded with.
        cells: the files of the index, each a graph of its own.
        cell_documents: how many documents each has.
        dimension: of its vectors.

    Raises:
        UserError: another stage's output, a damaged one, or one without an index.
    """

    def __init__(self, directory: Path, *, hashed: bool = True) -> None:
        self.directory = directory
        manifest = Manifest.load(directory, hashed=hashed)
        if manifest.stage not in ("pair", "index"):
            what = f"holds the output of {manifest.stage}, not of pair or index"
            raise UserError(directory, what, "give the right directory")
        self.cells = sorted((directory / INDEX).glob("cell-*.hnsw"))
        if not self.cells:
            remedy = "rerun pair with pair.keep_index=true, or with pair.backend=hnswlib"
            raise UserError(directory, "keeps no index", remedy)
        facts = [read_json(facts_path(cell)) for cell in self.cells]
        self.cell_documents = [int(cell["documents"]) for cell in facts]
        self.dimension: int = facts[0]["dimension"]
        if not (directory / MEMBERS).is_file():
            raise UserError(directory, "says not whose documents its index has", "rerun the stage that wrote it with --force")
        said = read_json(directory / MEMBERS)
        self.members = tuple(Member(**member) for member in said["members"])
        self.embedding = EmbedConfig.model_validate(said["embed"])

    def member_of(self, id: int) -> int:
        """Which member's document has this id: its place among the members."""
        return bisect_right([member.first for member in self.members], id) - 1

    def sort(self, directories: Sequence[Path], kind: Input) -> dict[int, Path]:
        """Directories by the place of the member that they are the corpus or the vectors of.

        Raises:
            UserError: one that is of no member.
        """
        known = [getattr(member, kind) for member in self.members]
        given = {}
        for directory in directories:
            fingerprint = Manifest.load(directory, STAGES[kind], hashed=False).fingerprint
            if fingerprint not in known:
                what = f"not what the index in {self.directory} was made from"
                raise UserError(directory, what, f"give the right --{kind}")
            given[known.index(fingerprint)] = directory
        return given

    def require(self, given: dict[int, Path], place: int, kind: Input) -> Path:
        """The directory of one member among those that `sort` sorted.

        Raises:
            UserError: it is not among them.
        """
        if place not in given:
            member = self.members[place]
            what = f"needs the {kind} with fingerprint {getattr(member, kind)} ({member.documents} documents) as well"
            raise UserError(self.directory, what, f"give it with --{kind}")
        return given[place]


def write_members(directory: Path, members: Sequence[Member], embedding: EmbedConfig) -> None:
    """Write whose documents the index in a directory has, and what they were embedded with."""
    said = {"embed": embedding.model_dump(mode="json"), "members": [asdict(member) for member in members]}
    write_json(directory / MEMBERS, said)


def embedding_of(vectors: Vectors) -> EmbedConfig:
    """What vectors were embedded with."""
    return EmbedConfig.model_validate(vectors.manifest.config["embed"])
