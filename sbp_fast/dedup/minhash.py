"""One-permutation MinHash over shingles of words, which finds near-duplicates without comparing all pairs of texts.

A text is a sequence of words: runs of ASCII letters and digits, in lower case, and every other character by itself. Words and
not tokens, because the tokenizer is trained on the documents that remain, and costs a hundred times as much. Shingles are
hashed and the hashes distributed over slots; the smallest hash of each slot is the signature (Li, Owen and Zhang 2012). An
empty slot takes the value of another slot, chosen by its index alone (Shrivastava 2017). Two texts agree in a slot with the
probability of their Jaccard similarity. A band of slots is hashed to one key; dissimilar texts hardly ever share a key.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from sbp_fast.data.permutation import mix
from sbp_fast.dedup.shingles import signature, window_hashes

SHINGLE_WORDS = 5
BANDS, ROWS = 20, 6  # 99.8% of pairs with similarity 0.8 share a band, 92% with 0.7, 27% with 0.5
FNV_OFFSET, FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)


@njit(cache=True)
def word_ids(text):  # type: ignore[no-untyped-def]
    """Hash each word of UTF-8 text to 32 bits. uint8 [bytes] -> uint32 [words]."""
    words = np.empty(len(text), np.uint32)
    count, state, wide = 0, FNV_OFFSET, False
    for byte in text:
        if 65 <= byte <= 90:
            byte += 32
        ascii = 48 <= byte <= 57 or 97 <= byte <= 122
        continued = wide and 128 <= byte < 192
        if state != FNV_OFFSET and not (continued or (ascii and not wide)):
            words[count] = mix(state) >> np.uint64(32)
            count, state = count + 1, FNV_OFFSET
        if ascii or byte >= 128:
            state = (state ^ np.uint64(byte)) * FNV_PRIME
            wide = byte >= 128
    if state != FNV_OFFSET:
        words[count] = mix(state) >> np.uint64(32)
        count += 1
    return words[:count]


@njit(cache=True)
def band_keys(text, offsets, width, bands, rows):  # type: ignore[no-untyped-def]
    """Return the band keys of many texts, and the number of words of each.

    Args:
        text: uint8, all texts concatenated.
        offsets: int64 [texts + 1], where each text starts.
        width: words of a shingle; a text of fewer words has one shingle, the whole text.
        bands: keys of a text.
        rows: slots hashed to a key.

    Returns:
        uint64 [bands, texts] and int64 [texts]; the keys of a text without words have no meaning.
    """
    texts = len(offsets) - 1
    keys, lengths = np.zeros((bands, texts), np.uint64), np.zeros(texts, np.int64)
    for index in range(texts):
        words = word_ids(text[offsets[index] : offsets[index + 1]])
        lengths[index] = len(words)
        if len(words) == 0:
            continue
        keys[:, index] = _keys(signature(window_hashes(words, min(width, len(words))), bands * rows), bands)
    return keys, lengths


@njit(cache=True)
def token_band_keys(tokens, offsets, width, bands, rows):  # type: ignore[no-untyped-def]
    """Return a hash of each text's tokens, and its band keys by shingles of tokens.

    Args:
        tokens: uint32, all texts concatenated, none of them empty.
        offsets: int64 [texts + 1], where each text starts.
        width: tokens of a shingle; a text of fewer tokens has one shingle, the whole text.
        bands: keys of a text.
        rows: slots hashed to a key.

    Returns:
        uint64 [1 + bands, texts], the hash first.
    """
    keys = np.zeros((1 + bands, len(offsets) - 1), np.uint64)
    for index in range(len(offsets) - 1):
        text = tokens[offsets[index] : offsets[index + 1]]
        keys[0, index] = window_hashes(text, len(text))[0]
        keys[1:, index] = _keys(signature(window_hashes(text, min(width, len(text))), bands * rows), bands)
    return keys


@njit(cache=True)
def _keys(slots, bands):  # type: ignore[no-untyped-def]
    """Hash the slots of a signature to one key a band. uint64 [bands * rows] -> uint64 [bands]."""
    keys, rows = np.zeros(bands, np.uint64), len(slots) // bands
    for band in range(bands):
        key = np.uint64(band)
        for row in range(rows):
            key = mix(key ^ slots[band * rows + row])
        keys[band] = key
    return keys


@njit(cache=True)
def jaccard(first, second):  # type: ignore[no-untyped-def]
    """Return the Jaccard similarity of two sets: the share of their union that both hold.

    Args:
        first: uint64, sorted, each value once.
        second: the same.
    """
    shared = a = b = 0
    while a < len(first) and b < len(second):
        left, right = first[a], second[b]
        shared += left == right
        a += left <= right
        b += right <= left
    return shared / max(len(first) + len(second) - shared, 1)
