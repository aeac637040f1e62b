"""Files of tokens, written field by field as Megatron-LM and datatrove define them, and a tokenizer for them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

END = "<|endoftext|>"
EXTRA = "<tool>"
MEGATRON_CODES = {"B": 1, "b": 2, "h": 3, "i": 4, "q": 5, "d": 6, "f": 7, "H": 8}
"""Letters of `struct` -> codes of Megatron-LM's class DType."""


def write_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """Write a byte-level tokenizer: 0 to 255 are bytes, then " t", " th", " the", END, and EXTRA, which is not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: id for id, character in enumerate(alphabet)}
    merges = [("\u0120", "t"), ("\u0120t", "h"), ("\u0120th", "e")]
    vocabulary |= {"\u0120t": 256, "\u0120th": 257, "\u0120the": 258}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken(EXTRA, normalized=False)])
    tokenizer.save(str(path))
    return tokenizer


def write_megatron(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], letter: str = "H") -> Path:
    """Write `prefix`.bin and `prefix`.idx; return the latter.

    Args:
        prefix: path without a suffix.
        documents: each a list of sequences of tokens.
        letter: of `struct` for a token.
    """
    sequences = [sequence for document in documents for sequence in document]
    with open(f"{prefix}.bin", "wb") as file:
        for sequence in sequences:
            for token in sequence:
                file.write(struct.pack(f"<{letter}", token))
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00")
        file.write((1).to_bytes(8, "little"))
        file.write(bytes([MEGATRON_CODES[letter]]))
        file.write(len(sequences).to_bytes(8, "little"))
        file.write((len(documents) + 1).to_bytes(8, "little"))
        for sequence in sequences:
            file.write(len(sequence).to_bytes(4, "little"))
        offset = 0
        for sequence in sequences:
            file.write(offset.to_bytes(8, "little"))
            offset += len(sequence) * struct.calcsize(letter)
        total = 0
        for document in [(), *documents]:
            total += len(document)
            file.write(total.to_bytes(8, "little"))
    return Path(f"{prefix}.idx")


def write_datatrove(
    path: Path, documents: Sequence[Sequence[int]], width: int = 2, *, loss: Sequence[int] = (), metadata: str = ""
) -> Path:
    """Write a file of tokens and its index; where they are given its loss mask, a number a token, and its metadata."""
    total = 0
    with path.open("wb") as file, Path(f"{path}.index").open("wb") as index:
        for document in documents:
            for token in document:
                file.write(token.to_bytes(width, "little"))
            total += len(document)
            index.write(total.to_bytes(8, "little"))
    if loss:
        Path(f"{path}.loss").write_bytes(bytes(loss))
    if metadata:
        Path(f"{path}.metadata").write_text(metadata)
    return path
