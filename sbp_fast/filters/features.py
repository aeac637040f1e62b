"""What is known of synthetic documents by themselves and beside their seeds, a shard of them at a time."""

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
from sbp_fast.dedup.shingles import window_hashes

ZSTD_LEVEL = 3
DECODED_AT_ONCE = 1024  # documents
LONGEST_RUN = 32  # of one character; the longest in the embedded corpus is 22, a line to write on
SOUND_CATEGORIES = ("L", "M", "N", "P", "Z", "Sc", "Cf")
SOUND_CONTROLS = "\t\n\r"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Measures:
    """Of each document of a shard; arrays of [documents].

    Attributes:
        tokens: int64, its length without <begin> and <end>.
        stop: str, why it ended: "end", "length" or "repetition".
        repeated: float64, share of its shingle positions whose shingle occurs more than once in it.
        compressed: float64, what zstd makes of its bytes, as a share of them; 1 for an empty text.
        unsound: float64, share of its characters that are not sound (see `unsound_share`).
        in_seed: float64, share of its distinct shingles that occur in its seed; 0 where it is too short to have one.
        in_corpus: float64, the same of any unique document.
        in_evaluation: float64, the same of the evaluation texts, but for those that occur in a unique document.
        holds_question: bool, whether an evaluation question with its answer stands in it.
    """

    tokens: np.ndarray
    stop: np.ndarray
    repeated: np.ndarray
    compressed: np.ndarray
    unsound: np.ndarray
    in_seed: np.ndarray
    in_corpus: np.ndarray
    in_evaluation: np.ndarray
    holds_question: np.ndarray


def measure_alone(prepared: PreparedCorpus, table: pa.Table, tokens: np.ndarray, width: int) -> dict[str, np.ndarray]:
    """The measures that need no other text than the documents' own and their seeds'.

    Args:
        table, tokens: of a shard (see `Corpus.shard`).
        width: tokens of a shingle.
    """
    lengths = table["tokens"].to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    repeated, in_seed = beside_seeds(prepared, table["seed"].to_numpy(), tokens.astype(np.uint32), offsets, width)
    compressed, unsound = np.ones(len(table)), np.zeros(len(table))
    for start in range(0, len(table), DECODED_AT_ONCE):
        ends = offsets[start : start + DECODED_AT_ONCE + 1]
        texts = prepared.tokenizer.decode_batch(np.split(tokens[ends[0] : ends[-1]], ends[1:-1] - ends[0]))
        part = slice(start, start + len(texts))
        compressed[part], unsound[part] = compression_ratios(texts), unsound_shares(texts)
    return {"tokens": lengths - 2, "repeated": repeated, "in_seed": in_seed, "compressed": compressed, "unsound": unsound}


def compression_ratios(texts: Sequence[str]) -> np.ndarray:
    """Bytes of each whole text as one zstd frame over its bytes in UTF-8. float64 [texts]

    A short text compresses badly, sound or not, so a low ratio never comes of length alone.
    """
    compressor = zstandard.ZstdCompressor(ZSTD_LEVEL, write_content_size=False)
    encoded = [text.encode() for text in texts]
    return np.array([len(compressor.compress(text)) / len(text) if text else 1.0 for text in encoded])


def unsound_shares(texts: Sequence[str]) -> np.ndarray:
    """Share of each text's characters that are not sound. float64 [texts]

    Not sound are what stands for broken bytes, control characters but tab and line ends, all but letters, marks, digits,
    punctuation, white space, currency and ASCII symbols, and what goes beyond `LONGEST_RUN` times one character in a row.
    """
    sound = _sound_characters()
    codes = (np.frombuffer(text.encode("utf-32-le"), np.uint32) for text in texts)
    return np.array([_unsound(characters, sound) / max(len(characters), 1) for characters in codes])


@cache
def _sound_characters() -> np.ndarray:
    """Whether each code point is sound. bool [0x110000]"""
    return np.array([_is_sound(chr(code)) for code in range(0x110000)])


def _is_sound(character: str) -> bool:
    if character == REPLACEMENT:
        return False
    category = unicodedata.category(character)
    return category.startswith(SOUND_CATEGORIES) or character in SOUND_CONTROLS or (character.isascii() and category[0] == "S")


@njit(cache=True)
def _unsound(characters, sound):  # type: ignore[no-untyped-def]
    """How many are not sound. uint32 [characters], bool [0x110000]"""
    found = run = 0
    for place in range(len(characters)):
        run = run + 1 if place > 0 and characters[place] == characters[place - 1] else 1
        found += run > LONGEST_RUN or not sound[characters[place]]
    return found


def beside_seeds(
    prepared: PreparedCorpus, seeds: np.ndarray, tokens: np.ndarray, offsets: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """`Measures.repeated` and `Measures.in_seed`."""
    chosen, owner = np.unique(seeds, return_inverse=True)
    texts = [prepared.unique[int(seed)] for seed in chosen]
    seed_offsets = np.cumsum([0, *map(len, texts)])
    seed_tokens = np.concatenate([np.zeros(0, np.uint32), *texts]).astype(np.uint32)
    return _compare(tokens, offsets, seed_tokens, seed_offsets, owner.astype(np.int64), width)


@njit(cache=True)
def _sorted_hashes(tokens, offsets, text, width):  # type: ignore[no-untyped-def]
    body = tokens[offsets[text] + 1 : offsets[text + 1] - 1]
    return np.sort(window_hashes(body, width)) if len(body) >= width else np.zeros(0, np.uint64)


@njit(cache=True)
def _compare(tokens, offsets, seed_tokens, seed_offsets, owner, width):  # type: ignore[no-untyped-def]
    texts, last = len(offsets) - 1, -1
    repeated, in_seed = np.zeros(texts), np.zeros(texts)
    seed = np.zeros(0, np.uint64)
    for text in range(texts):
        hashes = _sorted_hashes(tokens, offsets, text, width)
        if len(hashes) == 0:
            continue
        if owner[text] != last:
            last = owner[text]
            seed = _sorted_hashes(seed_tokens, seed_offsets, last, width)
        distinct = again = shared = place = 0
        while place < len(hashes):
            end = place + 1
            while end < len(hashes) and hashes[end] == hashes[place]:
                end += 1
            at = np.searchsorted(seed, hashes[place])
            distinct += 1
            shared += at < len(seed) and seed[at] == hashes[place]
            again += end - place if end - place > 1 else 0
            place = end
        repeated[text], in_seed[text] = again / len(hashes), shared / distinct
    return repeated, in_seed
