"""Indexed datasets of Megatron-LM: `NAME.bin` has the tokens, `NAME.idx` says where their sequences and documents are.

The layout of `NAME.idx`, little-endian (megatron/core/datasets/indexed_dataset.py): the magic; uint64 version; uint8 code of
the dtype; uint64 sequences; uint64 entries of the third array. Then the arrays: int32 length of each sequence in tokens;
int64 offset of each in bytes; int64 sequences at which documents begin, and at the end the number of sequences. Behind them
multimodal datasets have an int8 mode of each sequence.
"""

from __future__ import annotations

import struct

import numpy as np

from sbp_fast.data.readers.reader import InputFile, register_reader
from sbp_fast.data.readers.tokens import TokenIndex, TokenReader, damaged, missing
from sbp_fast.errors import UserError

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}


class MegatronReader(TokenReader):
    """Reads a dataset by its index; a document is all of its sequences."""

    suffixes = (".idx",)
    compressed_suffixes = suffixes

    def companions(self, path: str) -> tuple[str, ...]:
        """Return the path of the tokens."""
        return (path[: -len(".idx")] + ".bin",)

    def open_index(self, file: InputFile) -> TokenIndex:
        """Return where the documents are, once everything that the index says is found to agree.

        Raises:
            UserError: a missing or damaged file, another version, a multimodal dataset, or one that holds no integers.
        """
        (path,), (shown,) = self.companions(file.path), self.companions(file.shown)
        if not file.system.isfile(path):
            raise missing(file, path)
        with file.open() as stream:
            content = stream.read()
        dtype, sequences, entries = _read_header(content, file.shown)
        lengths = np.frombuffer(content, "<i4", sequences, HEADER.size).astype(np.int64)
        pointers = np.frombuffer(content, "<i8", sequences, HEADER.size + 4 * sequences)
        documents = np.frombuffer(content, "<i8", entries, HEADER.size + 12 * sequences)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        if (lengths < 0).any() or (pointers != ends[:-1] * dtype.itemsize).any():
            raise damaged(file.shown, "its sequences do not follow each other")
        if not entries or documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
            raise damaged(file.shown, f"its documents do not divide its {sequences} sequences")
        size, expected = file.system.size(path), int(ends[-1]) * dtype.itemsize
        if size != expected:
            raise damaged(shown, f"has {size} bytes, and {file.shown} needs {expected}")
        return TokenIndex(path, dtype, ends[documents[1:]])


def _read_header(content: bytes, shown: str) -> tuple[np.dtype, int, int]:
    """Return the dtype of the tokens, the number of sequences, and the number of entries about documents."""
    if not content.startswith(MAGIC) or len(content) < HEADER.size:
        raise UserError(shown, "is no index of Megatron-LM", "give the .idx of an indexed dataset")
    _, version, code, sequences, entries = HEADER.unpack_from(content)
    if version != 1:
        raise UserError(shown, f"is of version {version}", "write the dataset with version 1")
    if code not in DTYPES:
        raise UserError(shown, f"has the unknown dtype code {code}", f"known are {min(DTYPES)} to {max(DTYPES)}")
    dtype = np.dtype(DTYPES[code])
    if dtype.kind == "f":
        raise UserError(shown, f"holds {dtype.name} numbers and no tokens", "give a dataset of integers")
    expected = HEADER.size + 12 * sequences + 8 * entries
    if len(content) == expected + sequences and sequences:
        raise UserError(shown, "is multimodal", "give a dataset of text alone")
    if len(content) != expected:
        raise damaged(shown, f"has {len(content)} bytes, and its header tells of {expected}")
    return dtype, sequences, entries


register_reader(MegatronReader())
