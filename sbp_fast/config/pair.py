"""Which documents are related."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sbp_fast.config.section import NO_EFFECT, Count, Section, Share


class PairConfig(Section):
    collapse_containment: Share = 0.8
    """Of documents that hold this share of each other's shingles only the first takes part."""
    neighbours: Count = 32
    """Nearest neighbours looked at for each document."""
    backend: Literal["auto", "exact", "bucket", "hnswlib"] = "auto"
    """What finds them: all products; products within buckets of near vectors; an hnswlib graph, which is kept beside the pairs
    and can be asked (`sbp-fast neighbours`). "auto" takes exact for few documents, bucket for many."""
    target_recall: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Share of the pairs inside the band that must be found; it decides how much is searched."""
    recall_queries: Count = 500
    """Documents whose neighbours are also searched exactly, to measure recall."""
    bucket_probes: Count = 4
    """Buckets probed at first; more until the target is reached."""
    hnsw_links: Count = 16
    hnsw_construction: Count = 200
    hnsw_search: Count = 128
    """Candidates held during a search at first; more until the target is reached."""
    keep_index: bool = False
    """Build and keep an hnswlib index where the backend is another."""
    cell_documents: Count = 1_000_000
    """Most documents joined at once, which bounds the memory; with more, each goes to its nearest few cells of this size."""
    cell_overlap: Annotated[int, Field(ge=1, le=8)] = 3
    """Cells that each document goes to."""
    similarity_low: float | Literal["auto"] = "auto"
    """Lower end of the similarity band; "auto" is what only `random_pair_rate` of random pairs exceed."""
    random_pair_rate: Annotated[float, Field(gt=0, lt=1)] = 0.002
    similarity_high: float = 1.0
    shingle_tokens: Count = 13
    near_copy_containment: Share = 0.2
    """A pair is a near-copy if this share of either document's shingles occurs in the other."""
    exclude_same_group: bool = True
    """Drop pairs within one original document (see `corpus.group_separator`)."""
    partners_per_seed: Count = 8
    seeds_per_partner: Count = 8
    memory_gib: Annotated[float, Field(gt=0), NO_EFFECT] = 2.0
    """For candidates, in each process; the pairs do not depend on it. A cell takes what its vectors take three times."""
