"""Tokenised files of datatrove: `NAME.ds` has the tokens, `NAME.ds.index` the end of each document.

The layout, little-endian (datatrove/pipeline/tokens/tokenizer.py): tokens are uint16, or uint32 where the vocabulary is larger
than 65,536; ends are uint64, in tokens. Beside them there may be `NAME.ds.loss`, a byte for each token, 0 where it has no loss,
and `NAME.ds.metadata`, whose first line ends in "|" and the bytes of a token.
"""

from __future__ import annotations

import numpy as np

from sbp_fast.data.readers.reader import InputFile, register_reader
from sbp_fast.data.readers.tokens import TokenIndex, TokenReader, damaged, missing

DTYPES = {2: "<u2", 4: "<u4"}


class DatatroveReader(TokenReader):
    """Reads a file of tokens by its index."""

    suffixes = (".ds",)
    compressed_suffixes = suffixes

    def companions(self, path: str) -> tuple[str, ...]:
        """Return the paths of the index, of the loss mask and of the metadata."""
        return f"{path}.index", f"{path}.loss", f"{path}.metadata"

    def open_index(self, file: InputFile) -> TokenIndex:
        """Return where the documents are.

        Raises:
            UserError: a missing index, or files whose sizes do not agree.
        """
        index, loss, metadata = self.companions(file.path)
        if not file.system.isfile(index):
            raise missing(file, index)
        content = file.system.cat_file(index)
        if len(content) % 8:
            raise damaged(f"{file.shown}.index", f"has {len(content)} bytes, no multiple of 8")
        ends = np.frombuffer(content, "<u8")
        if (ends[1:] < ends[:-1]).any():
            raise damaged(f"{file.shown}.index", "its documents do not follow each other")
        tokens, size = int(ends[-1]) if len(ends) else 0, file.system.size(file.path)
        width = next((width for width in DTYPES if size == width * tokens), 0)
        if not width:
            raise damaged(file.shown, f"has {size} bytes, neither 2 nor 4 for each of the {tokens} tokens of its index")
        if file.system.isfile(metadata):
            declared = file.system.cat_file(metadata).split(b"\n")[0].rpartition(b"|")[2].decode(errors="replace")
            if declared.isdecimal() and int(declared) != width and tokens:
                raise damaged(file.shown, f"has {width} bytes a token, and its metadata tell of {declared}")
        masked = file.system.isfile(loss)
        if masked and file.system.size(loss) != tokens:
            raise damaged(f"{file.shown}.loss", f"has {file.system.size(loss)} bytes for {tokens} tokens")
        return TokenIndex(file.path, np.dtype(DTYPES[width]), ends.astype(np.int64), loss if masked else "")


register_reader(DatatroveReader())
