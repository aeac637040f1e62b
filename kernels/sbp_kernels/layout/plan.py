"""The tile plan of a packed sequence: which tiles of keys and queries meet, which need the mask, longest work first.

Built on the host from `visible_until` alone, once a batch, and shared by every layer and by forward and backward.

Two tables of *tiles* describe the work of the kernels. A **query tile** is what one program of the forward and of the dQ
kernel computes: rows `[start, stop)`, over runs of keys. A **key tile** is what one program of the dK/dV kernel computes:
keys `[start, stop)`, over runs of queries. A *run* `[start, stop)` is walked in steps of a fixed size. The runs of a tile
come in two kinds: first those in which every step is whole and every pair visible, which need no mask, then those that do.

Tiles begin with a segment or a tile's length after its beginning, so that documents waste no part of a tile in front; a
tile that reaches the end of a segment goes on with the segments after it as long as they fit whole. That never adds a
step, and two neighbours together always exceed one tile, which bounds their number by the sequence's length alone.

A key that very many queries see (a seed of many partners) would keep one program busy long after the others are done. In
trees the work of such a key tile is therefore cut into parts, each a row of the table with a *slot* of its own, and the
parts are added in order afterwards: the result stays deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.int32]

TILE_COLUMNS = 6  # start, stop, first run, first masked run, one past the last run, slot (-1: the tile is whole)
SPLIT_COLUMNS = 4  # start, stop, first slot, one past the last slot
MAXIMUM_PARTS = 64  # no part of a tree's key tile is longer than this share of the work, nor cut shorter than
SHORTEST_PART = 32  # this many steps
SLOTS = 2 * MAXIMUM_PARTS  # of n tiles longer than a 64th of the work, the parts are fewer than 64 + n, and n < 64
NARROW_RATE = 0.8  # assumed speed of narrow tiles per unit of area against wide ones; not measured yet


@dataclass(frozen=True)
class Tiles:
    """Rows of the tiles and of the steps that the kernels take; powers of two, at least 16.

    Attributes:
        query_rows, key_step: of the forward and the dQ kernel.
        key_rows, query_step: of the dK/dV kernel.
    """

    query_rows: int
    key_step: int
    key_rows: int
    query_step: int


# of plans made without a device; the table of `_tuned` has those for devices
WIDE = Tiles(query_rows=128, key_step=64, key_rows=128, query_step=32)
NARROW = Tiles(query_rows=64, key_step=32, key_rows=64, query_step=32)


@dataclass(frozen=True, eq=False)  # == of tensors has no single truth value
class Plan:
    """The tables of one packed sequence, int32, padded with zeros to a capacity that depends on its length alone.

    (Trees in which a tile meets more runs than that holds get the next power of two.)

    Attributes:
        tiles: the sizes that the tables were made for.
        query_tiles, key_tiles: [capacity, 6], see TILE_COLUMNS; longest first, padding last.
        query_runs, key_runs: [capacity, 2]: start, stop.
        splits: [slots, 4], see SPLIT_COLUMNS; no rows where nothing may be split. There are more slots than splits.
    """

    tiles: Tiles
    query_tiles: Tensor
    query_runs: Tensor
    key_tiles: Tensor
    key_runs: Tensor
    splits: Tensor

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """The five tables, in the order of the attributes."""
        return self.query_tiles, self.query_runs, self.key_tiles, self.key_runs, self.splits

    def computed_pairs(self) -> tuple[int, int]:
        """(query, key) pairs that the query side and the key side compute, visible or not; reads the tables."""
        query_side = _steps(self.query_tiles, self.query_runs, self.tiles.key_step) * self.tiles.query_rows
        key_side = _steps(self.key_tiles, self.key_runs, self.tiles.query_step) * self.tiles.key_rows
        return query_side * self.tiles.key_step, key_side * self.tiles.query_step


def capacities(tokens: int, tiles: Tiles, *, may_split: bool) -> tuple[int, int, int, int, int]:
    """Rows of the five tables for a packed sequence of `tokens`."""
    queries, keys = (2 * (tokens // rows) + 2 for rows in (tiles.query_rows, tiles.key_rows))
    slots = SLOTS if may_split else 0
    return queries, 4 * queries, keys + slots, 3 * (keys + slots), slots


def choose_tiles(visible_until: Array, wide: Tiles = WIDE, narrow: Tiles = NARROW) -> Tiles:
    """Choose narrow tiles where wide ones would mostly compute invisible pairs (short documents), else wide ones."""
    starts, ends, until, parents, _ = find_segments(visible_until)
    areas = []
    for tiles in (wide, narrow):
        _, _, work = query_work(starts, ends, until, parents, tiles.query_rows, tiles.key_step)
        areas.append(int(work.sum()) * tiles.query_rows * tiles.key_step)
    return narrow if areas[1] < NARROW_RATE * areas[0] else wide


def build_plan(visible_until: Array, tiles: Tiles, *, may_split: bool) -> Plan:
    """Build the plan of a checked mask; `may_split` reserves slots for cutting up the keys that many queries see."""
    starts, ends, until, parents, _ = find_segments(visible_until)
    queries = query_work(starts, ends, until, parents, tiles.query_rows, tiles.key_step)
    keys = key_work(starts, ends, until, tiles.key_rows, tiles.query_step)
    splits = np.zeros((0, SPLIT_COLUMNS), np.int32)
    if may_split:
        *keys, splits = split_long_tiles(*keys, tiles.query_step, MAXIMUM_PARTS, SHORTEST_PART)
    tables = (*_longest_first(*queries), *_longest_first(*keys), splits)
    rows = capacities(len(visible_until), tiles, may_split=may_split)
    return Plan(tiles, *(_padded(table, capacity) for table, capacity in zip(tables, rows, strict=True)))


def _longest_first(tiles: Array, runs: Array, work: Array) -> tuple[Array, Array]:
    return tiles[np.argsort(-work, kind="stable")], runs


def _padded(rows: Array, capacity: int) -> Tensor:
    if len(rows) > capacity:
        capacity = 1 << (len(rows) - 1).bit_length()
    out = np.zeros((capacity, rows.shape[1]), np.int32)
    out[: len(rows)] = rows
    return torch.from_numpy(out)


def _steps(tiles: Tensor, runs: Tensor, step: int) -> int:
    used = runs[: int(tiles[:, 4].max())]
    return int(((used[:, 1] - used[:, 0] + step - 1) // step).sum())


@njit(cache=True)
def find_segments(visible_until):  # type: ignore[no-untyped-def]
    """Start, end, until and parent of the coarsest segments that have this mask, and the first token that fits no tree.

    A child that follows its parent at once and ends with it is one segment with it: the mask cannot tell them apart. The
    last value is -1 where `visible_until` is the mask of a segment tree: each token sees itself, and no two spans
    [j, visible_until[j]) cross.
    """
    tokens = len(visible_until)
    starts, ends, until, parents = np.empty((4, tokens), np.int32)
    path = np.empty(tokens, np.int32)  # open segments, root first
    count, depth, token = 0, 0, 0
    while token < tokens:
        last = visible_until[token]
        while depth > 0 and until[path[depth - 1]] <= token:
            depth -= 1
        top = path[depth - 1] if depth > 0 else -1
        if last <= token or last > (until[top] if depth > 0 else tokens):
            return starts[:0], ends[:0], until[:0], parents[:0], token
        end = token + 1
        while end < last and visible_until[end] == last:
            end += 1
        starts[count], ends[count], until[count], parents[count] = token, end, last, top
        path[depth] = count
        depth, count, token = depth + 1, count + 1, end
    return starts[:count], ends[:count], until[:count], parents[:count], -1


@njit(cache=True)
def cut(ends, rows):  # type: ignore[no-untyped-def]
    """Starts and stops of the tiles, and the segment in which each starts."""
    tokens = ends[-1] if len(ends) else 0
    capacity = 2 * (tokens // rows) + 2
    bounds = np.empty((capacity, 2), np.int32)
    first = np.empty(capacity, np.int32)
    count, start, segment = 0, 0, 0
    while start < tokens:
        while ends[segment] <= start:
            segment += 1
        stop = min(ends[segment], start + rows)
        following = segment + 1
        if stop == ends[segment]:
            while following < len(ends) and ends[following] - start <= rows:
                stop = ends[following]
                following += 1
        bounds[count, 0], bounds[count, 1], first[count] = start, stop, segment
        start, count = stop, count + 1
    return bounds[:count], first[:count]


@njit(cache=True)
def query_work(starts, ends, until, parents, rows, step):  # type: ignore[no-untyped-def]
    """Query tiles, their runs of keys, and the steps of each tile."""
    bounds, first = cut(ends, rows)
    deepest = 0
    depth = np.zeros(len(starts), np.int32)
    for segment in range(len(starts)):
        depth[segment] = depth[parents[segment]] + 1 if parents[segment] >= 0 else 1
        deepest = max(deepest, depth[segment])
    ranges = np.empty((deepest + 1, 3), np.int32)
    tiles = np.empty((len(bounds), 6), np.int32)
    runs = np.empty((len(bounds) * 2 * (deepest + 1), 2), np.int32)
    work = np.zeros(len(bounds), np.int32)
    total = 0
    for tile in range(len(bounds)):
        start, stop = bounds[tile]
        count = visible_keys(first[tile], start, stop, starts, ends, until, parents, ranges)
        tiles[tile, 0], tiles[tile, 1], tiles[tile, 2] = start, stop, total
        for index in range(count - 1, -1, -1):
            low, high, seen_by_all = ranges[index]
            whole = (high - low) // step * step if seen_by_all else 0
            if whole > 0:
                runs[total, 0], runs[total, 1] = low, low + whole
                total, work[tile] = total + 1, work[tile] + whole // step
            ranges[index, 0] = low + whole
        tiles[tile, 3] = total
        for index in range(count - 1, -1, -1):
            low, high, _ = ranges[index]
            if total > tiles[tile, 3] and runs[total - 1, 1] == low:
                runs[total - 1, 1] = high
            elif low < high:
                runs[total, 0], runs[total, 1] = low, high
                total += 1
        for run in range(tiles[tile, 3], total):
            work[tile] += (runs[run, 1] - runs[run, 0] + step - 1) // step
        tiles[tile, 4], tiles[tile, 5] = total, -1
    return tiles, runs[:total], work


@njit(cache=True)
def visible_keys(segment, start, stop, starts, ends, until, parents, ranges):  # type: ignore[no-untyped-def]
    """Fill `ranges` with (low, high, whether all rows see it) of the keys of tile [start, stop), last first; their number.

    The tile sees what its first segment and that one's ancestors hold before it, and itself: every other segment of the
    tile begins in it, and hangs on one of these.
    """
    ranges[0, 0], ranges[0, 1], ranges[0, 2] = start, stop, 0
    count = 1
    while segment >= 0:
        low, high, seen_by_all = starts[segment], min(ends[segment], start), until[segment] >= stop
        if low < high:
            if ranges[count - 1, 0] == high and ranges[count - 1, 2] == seen_by_all:
                ranges[count - 1, 0] = low
            else:
                ranges[count, 0], ranges[count, 1], ranges[count, 2] = low, high, seen_by_all
                count += 1
        segment = parents[segment]
    return count


@njit(cache=True)
def key_work(starts, ends, until, rows, step):  # type: ignore[no-untyped-def]
    """Key tiles, their runs of queries, and the steps of each tile.

    The queries that see one of the tile's keys follow each other without a gap, from the tile's start to the largest
    `until`; those from the tile's last key to the smallest `until` see all of them.
    """
    bounds, first = cut(ends, rows)
    tiles = np.empty((len(bounds), 6), np.int32)
    work = np.zeros(len(bounds), np.int32)
    runs = np.empty((3 * len(bounds), 2), np.int32)
    total = 0
    for tile in range(len(bounds)):
        start, stop = bounds[tile]
        smallest = largest = until[first[tile]]
        segment = first[tile] + 1
        while segment < len(starts) and starts[segment] < stop:
            smallest, largest = min(smallest, until[segment]), max(largest, until[segment])
            segment += 1
        low = start + (stop - 1 - start + step - 1) // step * step
        whole = max(0, (smallest - low) // step)
        high = low + whole * step
        begin = total
        if whole > 0:
            runs[total, 0], runs[total, 1] = low, high
            total += 1
        tiles[tile, 0], tiles[tile, 1], tiles[tile, 2], tiles[tile, 3] = start, stop, begin, total
        first_stop = low if whole > 0 else largest
        if start < first_stop:
            runs[total, 0], runs[total, 1] = start, first_stop
            total += 1
        if whole > 0 and high < largest:
            runs[total, 0], runs[total, 1] = high, largest
            total += 1
        for run in range(begin, total):
            work[tile] += (runs[run, 1] - runs[run, 0] + step - 1) // step
        tiles[tile, 4], tiles[tile, 5] = total, -1
    return tiles, runs[:total], work


@njit(cache=True)
def split_long_tiles(tiles, runs, work, step, maximum_parts, shortest_part):  # type: ignore[no-untyped-def]
    """Cut long tiles into parts; return the tables and the table of the splits."""
    longest = max(shortest_part, (work.sum() + maximum_parts - 1) // maximum_parts)
    parts = (work + longest - 1) // longest
    new_tiles = np.empty((parts.sum(), 6), np.int32)
    new_work = np.empty(len(new_tiles), np.int32)
    new_runs = np.empty((len(runs) + len(new_tiles), 2), np.int32)
    splits = np.empty((len(tiles), 4), np.int32)
    tile_count, run_count, split_count, slot = 0, 0, 0, 0
    for tile in range(len(tiles)):
        if parts[tile] > 1:
            splits[split_count, 0], splits[split_count, 1] = tiles[tile, 0], tiles[tile, 1]
            splits[split_count, 2], splits[split_count, 3] = slot, slot + parts[tile]
            split_count += 1
        for part in range(parts[tile]):
            low, high = part * work[tile] // parts[tile], (part + 1) * work[tile] // parts[tile]
            row = new_tiles[tile_count]
            row[0], row[1], row[2], row[3] = tiles[tile, 0], tiles[tile, 1], run_count, run_count
            before = 0  # steps of the runs passed
            for run in range(tiles[tile, 2], tiles[tile, 4]):
                start, stop = runs[run]
                steps = (stop - start + step - 1) // step
                here, there = max(low - before, 0), min(high - before, steps)
                if here < there:
                    new_runs[run_count, 0], new_runs[run_count, 1] = start + here * step, min(start + there * step, stop)
                    run_count += 1
                before += steps
                if run < tiles[tile, 3]:
                    row[3] = run_count
            row[4], row[5] = run_count, -1
            if parts[tile] > 1:
                row[5] = slot
                slot += 1
            new_work[tile_count] = high - low
            tile_count += 1
    return new_tiles, new_runs[:run_count], new_work, splits[:split_count]
