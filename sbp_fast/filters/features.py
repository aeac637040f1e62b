"""Features of synthetic documents, by themselves and beside their seeds, a shard at a time."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa
import zstandard
from numba import njit

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.dedup.seed_overlap import compare_with_seeds

ZSTD_LEVEL = 3
DECODED_DOCUMENTS = 1024
"""Documents decoded at a time."""
LONGEST_RUN = 32
"""Longest well-formed run of one character; the longest in the embedded corpus is 22, a line to write on."""
WELL_FORMED_CATEGORIES = ("L", "M", "N", "P", "Z", "Sc", "Cf")
WELL_FORMED_CONTROLS = "\t\n\r"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Features:
    """Features of the documents of a shard, which the filter rules read; arrays of [documents].

    Attributes:
        tokens: int64, length without <begin> and <end>.
        stop: str, why generation stopped: "end", "length" or "repetition".
        repeated_share: float64, share of the shingle positions whose shingle occurs more than once in the document.
        compression_ratio: float64, bytes after zstd over bytes before; 1 for an empty text.
        malformed_ratio: float64, share of malformed characters (see `malformed_character_ratios`).
        seed_containment: float64, share of the distinct shingles that occur in the seed; 0 for a document without a shingle.
        corpus_containment: float64, share of the distinct shingles that occur in any unique document.
        evaluation_containment: float64, share of the distinct shingles that occur in the evaluation texts and in no unique
            document.
        contains_question: bool, whether an evaluation question with its answer occurs in the document.
    """

    tokens: np.ndarray
    stop: np.ndarray
    repeated_share: np.ndarray
    compression_ratio: np.ndarray
    malformed_ratio: np.ndarray
    seed_containment: np.ndarray
    corpus_containment: np.ndarray
    evaluation_containment: np.ndarray
    contains_question: np.ndarray


def standalone_features(prepared: PreparedCorpus, table: pa.Table, tokens: np.ndarray, width: int) -> dict[str, np.ndarray]:
    """Return the features that need no other text than the documents and their seeds, by name.

    Args:
        prepared: the corpus that the seeds are in.
        table: the shard's documents (see `Corpus.shard`).
        tokens: the shard's tokens.
        width: tokens of a shingle.
    """
    lengths = table["tokens"].to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    seeds = table["seed"].to_numpy()
    repeated_share, seed_containment = compare_with_seeds(prepared, seeds, tokens.astype(np.uint32), offsets, width)
    compression_ratio, malformed_ratio = np.ones(len(table)), np.zeros(len(table))
    for start in range(0, len(table), DECODED_DOCUMENTS):
        ends = offsets[start : start + DECODED_DOCUMENTS + 1]
        texts = prepared.tokenizer.decode_batch(np.split(tokens[ends[0] : ends[-1]], ends[1:-1] - ends[0]))
        chunk = slice(start, start + len(texts))
        compression_ratio[chunk], malformed_ratio[chunk] = compression_ratios(texts), malformed_character_ratios(texts)
    return {
        "tokens": lengths - 2,
        "repeated_share": repeated_share,
        "seed_containment": seed_containment,
        "compression_ratio": compression_ratio,
        "malformed_ratio": malformed_ratio,
    }


def compression_ratios(texts: Sequence[str]) -> np.ndarray:
    """Return the size of each whole text as one zstd frame over its size in UTF-8; float64 [texts].

    A short text compresses badly whatever it says, so a low ratio never comes of length alone.
    """
    compressor = zstandard.ZstdCompressor(ZSTD_LEVEL, write_content_size=False)
    encoded = [text.encode() for text in texts]
    return np.array([len(compressor.compress(text)) / len(text) if text else 1.0 for text in encoded])


def malformed_character_ratios(texts: Sequence[str]) -> np.ndarray:
    """Return the share of each text's characters that are malformed; float64 [texts].

    Malformed are: the replacement character; control characters other than tab and line ends; characters other than letters,
    marks, digits, punctuation, white space, currency and ASCII symbols; and what exceeds a run of `LONGEST_RUN` times one
    character.
    """
    well_formed = _well_formed_characters()
    codes = (np.frombuffer(text.encode("utf-32-le"), np.uint32) for text in texts)
    return np.array([_count_malformed(characters, well_formed) / max(len(characters), 1) for characters in codes])


@cache
def _well_formed_characters() -> np.ndarray:
    """Return whether each code point is well-formed; bool [0x110000]."""
    return np.array([_is_well_formed(chr(code)) for code in range(0x110000)])


def _is_well_formed(character: str) -> bool:
    if character == REPLACEMENT:
        return False
    category = unicodedata.category(character)
    if category.startswith(WELL_FORMED_CATEGORIES) or character in WELL_FORMED_CONTROLS:
        return True
    return character.isascii() and category[0] == "S"


@njit(cache=True)
def _count_malformed(characters, well_formed):  # type: ignore[no-untyped-def]
    """Count the malformed of uint32 [characters], given bool [0x110000]."""
    count = run = 0
    for i in range(len(characters)):
        run = run + 1 if i > 0 and characters[i] == characters[i - 1] else 1
        count += run > LONGEST_RUN or not well_formed[characters[i]]
    return count
