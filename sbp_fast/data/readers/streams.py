"""Byte streams of input files, decompressed by suffix, and their lines, bounded in length."""

from __future__ import annotations

import bz2
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any

import zstandard

from sbp_fast.data.readers.reader import InputFile
from sbp_fast.errors import UserError

WINDOW_BYTES = 1 << 31  # the largest window of zstd --long=31
BLOCK_BYTES = 1 << 16  # read at once
PIECE_BYTES = 1 << 10  # decompressed at once: a decompressor that fails gives nothing of the piece in which it does
OUTPUT_BYTES = 1 << 20  # of a piece of bz2, which may expand a million times

CODECS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES).decompressobj(),
    ".bz2": bz2.BZ2Decompressor,
}
"""Suffix of compressed files -> a function that makes the decompressor of one member (frame) of it."""


def compressed(*suffixes: str) -> tuple[str, ...]:
    """Return suffixes with that of each codec behind them: ".jsonl.gz" and others for ".jsonl"."""
    return tuple(suffix + codec for suffix in suffixes for codec in CODECS)


@contextmanager
def open_stream(file: InputFile) -> Iterator[IO[bytes]]:
    """Open a file and decompress it as its suffix says.

    What stands before damage can be read, as far as its compressed form tells where the damage begins.

    Raises:
        UserError: while it is read: damaged or incomplete compressed data.
    """
    codec = next((codec for codec in CODECS if file.path.lower().endswith(codec)), None)
    with ExitStack() as stack:
        raw = stack.enter_context(file.open())
        yield (
            raw
            if codec is None
            else stack.enter_context(io.BufferedReader(_Chunks(_decompress(raw, codec, file)), BLOCK_BYTES))
        )


def read_line(stream: IO[bytes], limit: int) -> tuple[bytes | None, int]:
    """Return the next line, None in place of one of more than `limit` bytes, and its length in bytes, 0 at the end."""
    line = stream.readline(limit + 1)
    length = len(line)
    if length <= limit:
        return line, length
    while not line.endswith(b"\n") and (line := stream.readline(OUTPUT_BYTES)):
        length += len(line)
    return None, length


def too_large(where: str, limit: int) -> UserError:
    """Return the error for a record of more than `limit` bytes."""
    problem = f"a record of more than {limit >> 20} MiB"
    return UserError(where, problem, "divide or remove it, or raise corpus.maximum_record_mib")


class _Chunks(io.RawIOBase):
    """A raw stream of the bytes that an iterator yields."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _decompress(raw: IO[bytes], codec: str, file: InputFile) -> Iterator[bytes]:
    """Yield the content of one or several members, in bounded chunks."""
    decompressor = None
    while block := raw.read(BLOCK_BYTES):
        for start in range(0, len(block), PIECE_BYTES):
            piece = block[start : start + PIECE_BYTES]
            while piece:
                if decompressor is None:
                    piece = piece.lstrip(b"\0") if codec == ".gz" else piece  # zeros may pad the end of a gzip file
                    decompressor = CODECS[codec]() if piece else None
                    continue
                try:
                    yield decompressor.decompress(piece, OUTPUT_BYTES) if codec == ".bz2" else decompressor.decompress(piece)
                    while not decompressor.eof and not getattr(decompressor, "needs_input", True):
                        yield decompressor.decompress(b"", OUTPUT_BYTES)
                except (zlib.error, zstandard.ZstdError, OSError) as error:
                    raise _damaged(file, str(error)) from None
                piece = decompressor.unused_data
                decompressor = None if decompressor.eof else decompressor
    if decompressor is not None:
        raise _damaged(file, "truncated")


def _damaged(file: InputFile, reason: str) -> UserError:
    return UserError(file.shown, f"cannot be read: its compressed data are damaged: {reason}", "give a whole file")
