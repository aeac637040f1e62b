"""Splits of large files, which several processes read in parallel, and groups of small ones, which one process reads.

A split knows how many records of its file come before it, so that its records have the names and numbers that they have in the
whole file. Which formats can be split, and how, is up to their readers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate

from sbp_fast.data.readers import InputFile
from sbp_fast.pipeline.executors.executor import Workers

SPLIT_BYTES = 256 << 20
GROUP_BYTES = 4 << 20


def split_files(files: Sequence[InputFile], workers: Workers, processes: int) -> list[list[InputFile]]:
    """Return each file as a list of its splits, in order, or as itself where it is not split.

    The splits of a file depend on that file alone.
    """
    splits = [_split(file) for file in files]
    uncounted = [part for parts in splits for part in parts if _is_uncounted(part)]
    counts = iter(list(workers.run(_count, uncounted, processes)) if uncounted else [])
    return [_number(parts, [next(counts) for part in parts if _is_uncounted(part)]) for parts in splits]


def group_files(files: Iterable[InputFile]) -> list[list[InputFile]]:
    """Return files in their order, in groups of `GROUP_BYTES` at most, or of a single file or split.

    A group is read in one piece: to begin and to seal a piece takes longer than to read a small file.
    """
    groups: list[list[InputFile]] = []
    size = 0
    for file in files:
        known = file.stored_bytes() if file.split is None else None
        added = GROUP_BYTES if known is None else known
        if not groups or size + added > GROUP_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += added
    return groups


def _split(file: InputFile) -> list[InputFile]:
    count = -(-(file.stored_bytes() or 0) // SPLIT_BYTES)
    splits = file.reader.split(file, count) if count > 1 else []
    return [replace(file, split=split) for split in splits] or [file]


def _is_uncounted(file: InputFile) -> bool:
    return file.split is not None and file.split.offset is None


def _count(file: InputFile) -> int:
    return file.reader.count(file)


def _number(parts: list[InputFile], counts: Sequence[int]) -> list[InputFile]:
    """Fill in the offsets of splits that were counted."""
    if not counts:
        return parts
    offsets = accumulate(counts[:-1], initial=0)
    return [
        replace(part, split=replace(part.split, offset=offset))
        for part, offset in zip(parts, offsets, strict=True)
        if part.split is not None
    ]
