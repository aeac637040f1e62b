"""Documents that another program tokenised, as text again: the base of the readers of such files.

A document is decoded with `corpus.tokenizer`, the tokenizer that made it. Special tokens at its two ends, such as the end of a
document, are left out; `prepare` puts its own there. Between them the corpus has the tokens of the file, because a document
whose text has other tokens is refused.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from sbp_fast.data.filesystem import user_errors
from sbp_fast.data.readers.reader import Fields, InputFile, InputSplit, Reader, Record
from sbp_fast.data.readers.streams import too_large
from sbp_fast.data.tokenizer import Tokenizer
from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import hash_file


@dataclass(frozen=True)
class TokenIndex:
    """Where the documents of a file of tokens are.

    Attributes:
        path: of the tokens, in the file system of the index.
        dtype: of a token.
        ends: int64 [documents], end of each document, in tokens.
        loss: path of a byte for each token, which is 0 where the token has no loss; "" where all have one.
    """

    path: str
    dtype: np.dtype
    ends: np.ndarray
    loss: str = ""


class TokenReader(Reader):
    """Reads documents of tokens; a large file is split by documents."""

    record_name = "document"

    @abstractmethod
    def open_index(self, file: InputFile) -> TokenIndex:
        """Return where the documents are.

        Raises:
            UserError: a file that is missing, damaged or of an unknown version.
        """

    def read(self, file: InputFile, fields: Fields) -> Iterator[Record | UserError]:
        """Yield the texts of the documents, and a UserError for each that has none or is too long.

        Raises:
            UserError: no tokenizer is named, or the files are damaged.
        """
        if fields.tokenizer == "train":
            remedy = "name the tokenizer.json that made them in corpus.tokenizer"
            raise UserError(file.shown, "holds tokens and no text", remedy)
        index = self.open_index(file)
        decoder = _load_decoder(fields.tokenizer, hash_file(Path(fields.tokenizer)), fields.lossy)
        documents = range(file.split.start, file.split.stop) if file.split else range(len(index.ends))
        with file.system.open(index.path, "rb") as stream:
            for document in documents:
                where = f"{file.shown}, {self.record_name} {document + 1}"
                try:
                    tokens = _read_tokens(file, stream, index, document, fields.record_bytes, where)
                    text, recoded = decoder.decode(tokens, where)
                except UserError as error:
                    yield error
                else:
                    yield Record({fields.text: text}, document + 1, recoded)

    def split(self, file: InputFile, count: int) -> list[InputSplit]:
        """Split by documents; a damaged file is left whole, and reading it names the damage."""
        try:
            with user_errors(file.system, file.shown):
                documents = len(self.open_index(file).ends)
        except UserError:
            return []
        count = min(count, documents)
        edges = (documents * part // count for part in range(count + 1))
        return [InputSplit(start, stop, start) for start, stop in pairwise(edges)]


def missing(file: InputFile, partner: str) -> UserError:
    """Return the error for a file without the one that belongs to it, given the path of that one."""
    return UserError(file.shown, f"{PurePosixPath(partner).name} is missing beside it", "give both files")


def damaged(shown: str, problem: str) -> UserError:
    """Return the error for a file that contradicts itself, or the one that belongs to it."""
    return UserError(shown, problem, "copy or write the dataset again")


def _read_tokens(file: InputFile, stream: IO[bytes], index: TokenIndex, document: int, limit: int, where: str) -> np.ndarray:
    """Return the tokens of a document.

    Raises:
        UserError: they take more than `limit` bytes, or some of them have no loss, while here all of a text has.
    """
    start, stop = int(index.ends[document - 1]) if document else 0, int(index.ends[document])
    if (stop - start) * index.dtype.itemsize > limit:
        raise too_large(where, limit)
    if index.loss and stop > start and b"\0" in file.system.cat_file(index.loss, start, stop):
        problem = f"{Path(index.loss).name} says that some of its tokens have no loss"
        raise UserError(where, problem, "leave it out, or remove that file to take all of every text")
    stream.seek(start * index.dtype.itemsize)
    return np.frombuffer(stream.read((stop - start) * index.dtype.itemsize), index.dtype)


@lru_cache(1)
def _load_decoder(path: str, content_hash: str, lossy: bool) -> _Decoder:
    return _Decoder(Tokenizer(path), lossy)


class _Decoder:
    """Decodes documents, and compares the tokens of their texts with theirs.

    Args:
        tokenizer: that made them.
        lossy: whether a text may have other tokens.
    """

    def __init__(self, tokenizer: Tokenizer, lossy: bool) -> None:
        self._tokenizer, self._lossy = tokenizer, lossy
        self._own, self._special = (np.zeros(tokenizer.vocabulary_size, bool) for _ in range(2))
        self._own[[id for token, id in tokenizer.vocabulary().items() if token not in tokenizer.new_tokens]] = True
        self._special[tokenizer.special_ids()] = True

    def decode(self, tokens: np.ndarray, where: str) -> tuple[str, bool]:
        """Return the text of a document without the special tokens at its ends, and whether it has other tokens.

        Raises:
            UserError: a token that the tokenizer does not have, a special one in the middle, or a text with other tokens.
        """
        unknown = (tokens < 0) | (tokens >= len(self._own))
        unknown |= ~self._own[np.where(unknown, 0, tokens)]
        if unknown.any():
            position = int(np.argmax(unknown))
            problem = f"its token {position + 1}, {tokens[position]}, is not in the vocabulary"
            raise UserError(where, problem, "name the tokenizer that made it in corpus.tokenizer")
        special = self._special[tokens]
        first, last = np.flatnonzero(~special)[[0, -1]].tolist() if not special.all() else (0, -1)
        if special[first : last + 1].any():
            position = first + int(np.argmax(special[first : last + 1]))
            problem = f"its token {position + 1} is {self._tokenizer.token(int(tokens[position]))}, a special one in the middle"
            raise UserError(where, problem, "leave it out, or divide it there into documents")
        ids = tokens[first : last + 1].tolist()
        text = self._tokenizer.decode(ids)
        recoded = self._tokenizer.encode(text) != ids
        if recoded and not self._lossy:
            remedy = "name the tokenizer that made it in corpus.tokenizer; corpus.lossy_tokenizer = true takes the text"
            raise UserError(where, "its text has other tokens", remedy)
        return text, recoded
