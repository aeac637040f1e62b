"""Large files as spans that several processes read side by side: lines of JSONL, row groups of parquet.

A span knows how many records of its file come before it, so that records have the names and places they have in the whole. What
is compressed as one stream cannot be cut, and lines of a remote file are not counted: that would be to read it twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from sbp_fast.data.documents import File, Span
from sbp_fast.data.filesystem import user_errors
from sbp_fast.errors import UserError
from sbp_fast.pipeline.executors.executor import Workers

SPAN_BYTES = 256 << 20
COUNTED_AT_ONCE = 1 << 22


def cut_files(files: Sequence[File], workers: Workers, processes: int) -> list[list[File]]:
    """Each file as itself or as its spans, in order. What a file is cut into depends on that file alone."""
    cut = [_cut(file) for file in files]
    lines = [span for spans in cut for span in spans if span.span is not None and span.path.endswith(".jsonl")]
    if not lines:
        return cut
    ended = dict(zip(lines, workers.run(_count_ends, lines, processes), strict=True))
    return [_number(spans, [ended[span] for span in spans]) if spans[0] in ended else spans for spans in cut]


def _cut(file: File) -> list[File]:
    with user_errors(file.system, file.shown):
        size = file.system.size(file.path) or 0
    count = -(-size // SPAN_BYTES)
    if count > 1 and file.path.endswith(".parquet"):
        return _cut_groups(file, count)
    if count > 1 and file.path.endswith(".jsonl") and isinstance(file.system, LocalFileSystem):
        edges = (size * number // count for number in range(count + 1))
        return [replace(file, span=Span(start, stop, 0)) for start, stop in pairwise(edges)]
    return [file]


def _cut_groups(file: File, count: int) -> list[File]:
    try:
        with user_errors(file.system, file.shown), file.system.open(file.path, "rb") as stream:
            facts = pq.ParquetFile(stream).metadata
            rows = [facts.row_group(group).num_rows for group in range(facts.num_row_groups)]
    except UserError:
        return [file]  # who reads it says so
    before, count = [0, *accumulate(rows)], min(count, len(rows))
    edges = (len(rows) * number // count for number in range(count + 1))
    return [replace(file, span=Span(start, stop, before[start])) for start, stop in pairwise(edges)] or [file]


def _count_ends(file: File) -> int:
    """The ends of lines from the byte before a span, where its reader begins to look for a line, to where the next one does."""
    assert file.span is not None
    left = (file.span.stop - 1) - (start := max(file.span.start - 1, 0))
    ends = 0
    with user_errors(file.system, file.shown), file.system.open(file.path, "rb") as stream:
        stream.seek(start)
        while left > 0 and (part := stream.read(min(left, COUNTED_AT_ONCE))):
            ends += part.count(b"\n")
            left -= len(part)
    return ends


def _number(spans: Sequence[File], ends: Sequence[int]) -> list[File]:
    found = []
    for file, before in zip(spans, accumulate(ends[:-1], initial=0), strict=True):
        assert file.span is not None
        found.append(replace(file, span=replace(file.span, before=before)))
    return found
