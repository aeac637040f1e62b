"""Random batches of decode attention for its tests: groups in shuffled pages and rows, with NaN in all unused memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from sbp_kernels import DecodeLayout
from torch import Tensor

Group = tuple[int, list[int]]  # tokens of the seed, 0 for an empty slot; own tokens of each sample, 0 if it is not running


@dataclass(frozen=True)
class Batch:
    """Arguments of `decode_attention`, and the row of each running sample by (group, sample)."""

    q: Tensor
    keys: Tensor
    values: Tensor
    layout: DecodeLayout
    rows: dict[tuple[int, int], int]

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, DecodeLayout]:
        return self.q, self.keys, self.values, self.layout


def groups(samples: int = 2, longest: int = 70) -> st.SearchStrategy[list[Group]]:
    """Return one or two groups, whose lengths often are at the ends of pages and splits."""
    tokens = st.one_of(st.sampled_from([0, 1, 16, 17, 31, 32, 33, 64, 65]), st.integers(0, longest))
    return st.lists(st.tuples(tokens, st.lists(tokens, min_size=samples, max_size=samples)), min_size=1, max_size=2)


def batch(
    of: Sequence[Group], heads: tuple[int, int] = (6, 2), width: int = 16, page: int = 16,
    dtype: torch.dtype = torch.float32, stored: torch.dtype | None = None, idle: int = 1, spare: int = 1, seed: int = 0,
    device: str = "cpu",
) -> Batch:  # fmt: skip
    """Return a batch whose numbers depend only on group, sample and token; `seed` shuffles pages and rows.

    Args:
        heads: H and K.
        page: tokens of one.
        stored: dtype of the pages, by default that of the queries.
        idle: rows besides those of samples, and slots besides those of groups.
        spare: pages of the tables beyond the longest sequence.
    """
    random = np.random.default_rng(seed)
    drawn = [(group, sample) for group, (_, owns) in enumerate(of) for sample, own in enumerate(owns) if own]
    pages_of = lambda counts: max([-(-count // page) for count in counts] + [0]) + spare  # noqa: E731
    lengths = [seed_tokens for seed_tokens, _ in of], [own for _, owns in of for own in owns]
    layout = DecodeLayout.empty(len(of) + idle, len(of[0][1]), len(drawn) + idle, *map(pages_of, lengths))
    total = sum(-(-count // page) for counts in lengths for count in counts)
    free = iter((random.permutation(total + 2) + 1).tolist())
    keys, values = (torch.full((total + 3, heads[1], page, width), float("nan")).to(stored or dtype) for _ in range(2))
    layout.seed_pages.fill_(10**6)  # whatever is not in use must not be followed
    layout.own_pages.fill_(10**6)

    def place(table: Tensor, count: int, name: tuple[int, int]) -> None:
        numbers = torch.Generator().manual_seed(1000 * name[0] + name[1])
        k, v = torch.randn(2, count, heads[1], width, generator=numbers, dtype=torch.float64)
        for start in range(0, count, page):
            table[start // page] = where = next(free)
            for cache, x in (keys, k), (values, v):
                part = x[start : start + page].transpose(0, 1)
                storage = cache[where, :, : part.shape[1]]
                storage.copy_(part.to(storage.dtype))

    slots, rows = random.permutation(len(of) + idle), random.permutation(len(drawn) + idle)
    row_of = {}
    for group, (seed_tokens, owns) in enumerate(of):
        slot = int(slots[group])
        layout.seed_tokens[slot] = seed_tokens
        place(layout.seed_pages[slot], seed_tokens, (group, 0))
        for where, sample in enumerate(random.permutation(len(owns)).tolist()):
            if owns[sample]:
                row_of[group, sample] = row = int(rows[len(row_of)])
                layout.group_rows[slot, where], layout.row_group[row] = row, slot
                layout.own_tokens[row] = owns[sample]
                place(layout.own_pages[row], owns[sample], (group, sample + 1))
    q = torch.full((len(drawn) + idle, heads[0], width), float("nan"), dtype=dtype)
    for (group, sample), row in row_of.items():
        numbers = torch.Generator().manual_seed(1000 * group + sample)
        q[row] = torch.randn(heads[0], width, generator=numbers, dtype=torch.float64).to(dtype)
    moved = DecodeLayout(*(x.to(device) for x in layout.tensors))
    return Batch(q.to(device), keys.to(device), values.to(device), moved, row_of)


def torch_operation(batch: Batch) -> Tensor:
    """Return the result of torch's own attention, row by row, in the dtype of the queries."""
    out = torch.zeros_like(batch.q)
    layout, page = batch.layout, batch.keys.shape[2]
    for row in batch.rows.values():
        group = int(layout.row_group[row])
        parts = (layout.seed_pages[group], int(layout.seed_tokens[group])), (layout.own_pages[row], int(layout.own_tokens[row]))
        k, v = (
            torch.cat(
                [
                    torch.cat([cache[index].to(batch.q.dtype) for index in pages[: -(-count // page)].tolist()], 1)[:, :count]
                    for pages, count in parts
                    if count
                ],
                1,
            )
            for cache in (batch.keys, batch.values)
        )
        out[row] = F.scaled_dot_product_attention(batch.q[row][:, None], k, v, enable_gqa=True)[:, 0]
    return out
