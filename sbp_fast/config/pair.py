"""Settings of the search for related documents."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from sbp_fast.config.section import NO_EFFECT, Count, Gibibytes, Section, Share

Similarity = Annotated[float, Field(ge=-1, le=1)]
RENAMED_BACKENDS = {"bucket": "ivf", "hnswlib": "hnsw"}


class PairConfig(Section):
    """Settings of the search for related documents."""

    file: Annotated[str | tuple[str, ...], NO_EFFECT] = ""
    """Pairs whose relation is known, to be taken in place of a search: JSON lines or Parquet with the ids `seed` and `partner`
    and perhaps a `similarity` (1 without it). They need no vectors, and no other setting of this section applies to them. Pairs
    of held-out documents measure what a synthesizer learnt. "" searches."""
    duplicate_containment: Share = 0.8
    """Documents that share this fraction of their shingles are duplicates, of which only the first takes part."""
    neighbors: Count = 32
    """Nearest neighbors of each document that become candidates."""
    backend: str = "auto"
    """Name of a kNN backend (`sbp_fast/neighbors/backends.py`). `exact`: all inner products. `ivf`: an inverted file, inner
    products within buckets of near vectors. `hnsw`: an hnswlib graph, which is saved beside the pairs and can be queried
    (`sbp-fast neighbors`). "auto" takes exact for few documents, ivf for many."""
    target_recall: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Share of the pairs inside the band that must be found; it decides the search budget."""
    recall_queries: Count = 500
    """Documents whose neighbors are also searched exactly, to measure recall."""
    nprobe: Count = 4
    """With ivf: buckets probed at first; more until the target is reached."""
    hnsw_m: Count = 16
    """Edges of a node in each layer of the hnsw graph but the lowest, which has twice as many."""
    hnsw_ef_construction: Count = 200
    """Size of the candidate list while a document is inserted into the hnsw graph."""
    hnsw_ef_search: Count = 128
    """Size of the candidate list during a search of the hnsw graph at first; more until the target is reached."""
    save_index: bool = False
    """Build and save an hnsw index where the backend is another."""
    partition_documents: Count = 1_000_000
    """Most documents in one self-join, which bounds the memory; with more, each goes to its nearest few partitions of this
    size."""
    partition_overlap: Annotated[int, Field(ge=1, le=8)] = 3
    """Partitions that each document goes to."""
    similarity_low: Similarity | Literal["auto"] = "auto"
    """Lower end of the similarity band; "auto" is the similarity that `random_pair_rate` of random pairs exceed."""
    random_pair_rate: Annotated[float, Field(gt=0, lt=1)] = 0.002
    """Share of random pairs that exceed the lower end of the band if that is "auto"."""
    similarity_high: Similarity = 1.0
    """Upper end of the similarity band."""
    shingle_tokens: Count = 13
    """Tokens of a shingle."""
    near_duplicate_containment: Share = 0.2
    """A pair is a near-duplicate if this share of either document's shingles occurs in the other."""
    exclude_same_group: bool = True
    """Drop pairs within one original document (see `corpus.group_separator`)."""
    partners_per_seed: Count = 8
    """Most partners of a document as a seed."""
    seeds_per_partner: Count = 8
    """Most seeds of a document as a partner."""
    memory_gib: Annotated[Gibibytes, NO_EFFECT] = 2.0
    """Memory of each process for candidates; the pairs do not depend on it. A partition takes three times its vectors."""

    @field_validator("backend")
    @classmethod
    def _refuse_renamed(cls, backend: str) -> str:
        if backend in RENAMED_BACKENDS:
            raise PydanticCustomError("renamed", "it has a new name, {name}", {"name": RENAMED_BACKENDS[backend]})
        return backend

    @model_validator(mode="after")
    def _band_holds_something(self) -> PairConfig:
        if self.similarity_low != "auto" and self.similarity_low >= self.similarity_high:
            raise ValueError(
                f"similarity_low = {self.similarity_low:g} is not below similarity_high = {self.similarity_high:g}"
            )
        return self
