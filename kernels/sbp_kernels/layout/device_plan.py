"""The layout of independent documents whose `cu_seqlens` is on a device, built there without host-device synchronisation.

Shapes follow from the number of tokens and of documents alone. Tiles end with their document: unlike on the host, short
documents do not share one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sbp_kernels.layout.plan import SPLIT_COLUMNS, Plan, Tiles


def plan_documents(cu_seqlens: Tensor, tokens: int, tiles: Tiles) -> tuple[Tensor, Tensor, Plan]:
    """`visible_until` [T], `positions` [T] and the plan of the documents that end at `cu_seqlens[1:]`, all int32."""
    ends = torch.cat([cu_seqlens[1:].long(), cu_seqlens.new_full((1,), tokens, dtype=torch.int64)]).clamp(max=tokens)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    token = torch.arange(tokens, device=ends.device)
    document = torch.searchsorted(ends, token, right=True)
    until, positions = ends[document], token - starts[document]
    plan = Plan(
        tiles,
        *_query_side(starts, ends, tokens, tiles.query_rows, tiles.key_step),
        *_key_side(starts, ends, tokens, tiles.key_rows, tiles.query_step),
        torch.zeros(0, SPLIT_COLUMNS, dtype=torch.int32, device=ends.device),
    )
    return until.int(), positions.int(), plan


def tiles_of_runs(starts: Tensor, ends: Tensor, tokens: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Start and stop of each tile, equal where there is none, and start and end of its document.

    Args:
        starts: int64 [documents], where each document starts.
        ends: int64 [documents], where it ends; documents may be empty.
        tokens: number of tokens in all.
        rows: of a tile at most.
    """
    tiles_until = ((ends - starts + rows - 1) // rows).cumsum(0)
    tile = torch.arange(tokens // rows + len(ends), device=ends.device)
    document = torch.searchsorted(tiles_until, tile, right=True)
    used = document < len(ends)
    document = document.clamp(max=len(ends) - 1)
    before = torch.where(document > 0, tiles_until[document - 1], 0)
    start = starts[document] + (tile - before) * rows
    stop = torch.minimum(start + rows, ends[document])
    return torch.where(used, start, 0), torch.where(used, stop, 0), starts[document], ends[document]


def _query_side(starts: Tensor, ends: Tensor, tokens: int, rows: int, step: int) -> tuple[Tensor, Tensor]:
    start, stop, first_key, _ = tiles_of_runs(starts, ends, tokens, rows)
    whole = (start - first_key) // step * step
    boundary = first_key + whole
    runs = torch.stack([first_key, boundary, boundary, stop], 1).view(-1, 2)
    return _sorted(start, stop, whole + stop - boundary, 2), runs.int()


def _key_side(starts: Tensor, ends: Tensor, tokens: int, rows: int, step: int) -> tuple[Tensor, Tensor]:
    start, stop, _, until = tiles_of_runs(starts, ends, tokens, rows)
    low = torch.minimum(start + (stop - 1 - start + step - 1) // step * step, until)
    high = low + (until - low) // step * step
    runs = torch.stack([low, high, start, low, high, until], 1).view(-1, 2)
    return _sorted(start, stop, until - start, 3), runs.int()


def _sorted(start: Tensor, stop: Tensor, work: Tensor, runs: int) -> Tensor:
    """The table of tiles, longest first; tile t owns the runs from t * `runs` on, of which the first needs no mask."""
    first = torch.arange(len(start), device=start.device) * runs
    table = torch.stack([start, stop, first, first + 1, first + runs, torch.full_like(first, -1)], 1)
    used = stop > start
    order = torch.argsort(torch.where(used, work, -1), descending=True, stable=True)
    return torch.where(used.unsqueeze(1), table, 0)[order].int()
