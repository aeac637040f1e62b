"""Thresholds of the rules that reject synthetic documents."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sbp_fast.config.section import NO_EFFECT, Count, Gibibytes, Section, Share


class FilterConfig(Section):
    """Thresholds of the built-in filter rules, in order of precedence (docs/method.md). A shingle is a run of tokens."""

    minimum_tokens: Count = 16
    """Reject shorter documents."""
    keep_unfinished: bool = False
    """Keep documents that reached the maximum length before their end token."""
    shingle_tokens: Count = 13
    """Tokens of a shingle."""
    maximum_repeated_shingles: Share = 0.0
    """Share of a document's shingles that may occur more than once in it."""
    minimum_compression_ratio: Share = 0.25
    """Reject a document if zstd leaves a smaller share of its bytes; no document of the embedded corpus is below 0.32."""
    maximum_malformed_characters: Share = 0.02
    """Malformed-character ratio that a document may have: broken or control characters, rare symbols, long runs of one
    character; real documents of the embedded corpus have 0.003 at most."""
    copy_containment: Share = 0.3
    """Reject a document if this share of its shingles, or more, occurs in its seed, or in the unique documents."""
    evaluation_containment: Share = 0.1
    """Reject a document if this share of its shingles, or more, occurs in the evaluation texts and in no unique document, or if
    it contains a whole question with its answer."""
    duplicate_similarity: Annotated[float, Field(ge=0.7, le=2)] = 0.8
    """Reject a document if its shingles have this Jaccard similarity, or more, to those of an earlier filtered document; above
    1 equal documents stay too."""
    memory_gib: Annotated[Gibibytes, NO_EFFECT] = 2.0
    """Memory of the table of real shingles; with less, the documents are read more often. No result depends on it."""
