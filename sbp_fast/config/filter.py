"""Which synthetic documents are rejected."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sbp_fast.config.section import NO_EFFECT, Count, Section, Share


class FilterConfig(Section):
    """What a synthetic document goes for, in the order of precedence (docs/method.md). A shingle is a run of tokens."""

    minimum_tokens: Count = 16
    """A shorter document goes."""
    keep_unfinished: bool = False
    """Keep documents cut off by the length limit before their end token."""
    shingle_tokens: Count = 13
    maximum_repeated_shingles: Share = 0.0
    """Share of a document's shingles that may occur more than once in it."""
    minimum_compression_ratio: Share = 0.25
    """A document goes if zstd leaves less than this of its bytes; no document of the embedded corpus is below 0.32."""
    maximum_unsound_characters: Share = 0.02
    """Share of a document's characters that may be broken, control characters, rare symbols or one character again and again;
    real documents of the embedded corpus have 0.003 at most."""
    copy_containment: Share = 0.3
    """A document is a copy if this share of its shingles occurs in its seed, or in any real document."""
    evaluation_containment: Share = 0.1
    """A document is contaminated if this share of its shingles occurs in the evaluation texts and in no unique document, or if
    it holds a whole question with its answer."""
    duplicate_similarity: Annotated[float, Field(ge=0.7, le=1)] = 0.8
    """A document goes if an earlier one that stays is so much like it: of the shingles of either, both have this share."""
    memory_gib: Annotated[float, Field(gt=0), NO_EFFECT] = 2.0
    """Of the table of real shingles; with less, the documents are read more often. No result depends on it."""
