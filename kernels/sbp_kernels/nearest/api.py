"""`nearest_in_buckets`: show each query the members of one bucket, and keep its K nearest of all it was shown.

Nearest neighbours by an inverted file (Jegou et al. 2011, section IV), for many queries at once: in round r each query is
shown its r-th nearest bucket. So a round changes each list once, and those that probe one bucket share the products with it.
One bucket of all members is the exact search.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sbp_kernels._backends import check_device
from sbp_kernels._registration import register_operation

MOST_NEIGHBOURS = 1024  # of the kernel, which sorts as many in registers
PLAIN_MEMBERS = 4096  # whose products with all queries of their bucket the torch form holds at once
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def nearest_in_buckets(
    scores: Tensor,
    indices: Tensor,
    queries: Tensor,
    own_index: Tensor,
    buckets: Tensor,
    members: Tensor,
    starts: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Update the K members of greatest inner product with each query by those of one bucket; of equals the lower indices stay.

    Backends round products differently. A member that is shown to a query twice is in its list twice. Not differentiable.

    Args:
        scores: float32 [Q, K], updated in place: the products, greatest first; -inf where there is none, as at the beginning.
        indices: int64 [Q, K], updated in place: rows of `members`; -1 where there is none, as at the beginning.
        queries: [Q, D] float32, bfloat16 or float16, finite.
        own_index: int64 [Q], the row of `members` that a query itself is, which is not shown to it; -1 if it is none.
        buckets: int64 [Q] in [0, B), the bucket that each query is shown.
        members: [N, D], as `queries`, N below 2**31; those of a bucket side by side.
        starts: int64 [B + 1], from 0 to N: bucket b is members[starts[b]:starts[b + 1]].
        backend: "triton", for CUDA tensors (and for any where TRITON_INTERPRET=1 is set, which is slow and for checking), up
            to 1,024 neighbours; "torch", for every device, with a host-device synchronisation; or "auto", the first of these
            that can run.

    Raises:
        ValueError: naming the argument that does not fit, or a backend that is unknown or cannot run here.
    """
    _check(scores, indices, queries, own_index, buckets, members, starts)
    if len(queries):
        BACKENDS[_resolved(backend, scores)](scores, indices, queries, own_index, buckets, members, starts)


def _plain(
    scores: Tensor, indices: Tensor, queries: Tensor, own_index: Tensor, buckets: Tensor, members: Tensor, starts: Tensor
) -> None:
    bounds = starts.tolist()
    for bucket in buckets.unique().tolist():
        rows = (buckets == bucket).nonzero().squeeze(1)
        for first in range(bounds[bucket], bounds[bucket + 1], PLAIN_MEMBERS):
            shown = torch.arange(first, min(first + PLAIN_MEMBERS, bounds[bucket + 1]), device=members.device)
            products = queries[rows].float() @ members[shown].float().T
            products.masked_fill_(shown == own_index[rows, None], -torch.inf)  # the list has a -1 for it, which comes first
            candidates = torch.cat([scores[rows], products], 1)
            by_index, order = torch.cat([indices[rows], shown.expand_as(products)], 1).sort(1)
            sorted_scores, best = candidates.gather(1, order).sort(dim=1, descending=True, stable=True)
            scores[rows] = sorted_scores[:, : scores.shape[1]]
            indices[rows] = by_index.gather(1, best)[:, : scores.shape[1]]


def _fused(
    scores: Tensor, indices: Tensor, queries: Tensor, own_index: Tensor, buckets: Tensor, members: Tensor, starts: Tensor
) -> None:
    torch.ops.sbp_kernels.nearest_in_buckets(scores, indices, queries, own_index, buckets, members, starts)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]] = {
    "triton": _fused,
    "torch": _plain,
}


def _resolved(backend: str, scores: Tensor) -> str:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend {backend!r} is unknown: use one of auto, {', '.join(BACKENDS)}")
    few = scores.shape[1] <= MOST_NEIGHBOURS
    if backend == "auto":
        return "triton" if scores.is_cuda and few else "torch"
    if backend == "triton":
        check_device(scores)
        if not few:
            raise ValueError(f"backend 'triton' keeps up to {MOST_NEIGHBOURS} neighbours, not {scores.shape[1]}: use 'torch'")
    return backend


def _check(
    scores: Tensor, indices: Tensor, queries: Tensor, own_index: Tensor, buckets: Tensor, members: Tensor, starts: Tensor
) -> None:
    if queries.dim() != 2 or members.dim() != 2 or queries.shape[1] != members.shape[1]:
        raise ValueError(f"queries and members must be [Q, D], [N, D]: got {tuple(queries.shape)}, {tuple(members.shape)}")
    if queries.dtype != members.dtype or queries.dtype not in DTYPES:
        given = f"{queries.dtype}, {members.dtype}"
        raise ValueError(f"queries and members must both be float32, bfloat16 or float16: got {given}")
    if scores.dim() != 2 or scores.shape[1] == 0:
        raise ValueError(f"scores must be [Q, K] with K at least 1: got {tuple(scores.shape)}")
    if starts.dim() != 1 or len(starts) < 2:
        raise ValueError(f"starts must be [B + 1] with B at least 1: got {tuple(starts.shape)}")
    rows = len(queries)
    for name, x, shape, dtype in (
        ("scores", scores, (rows, scores.shape[1]), torch.float32),
        ("indices", indices, (rows, scores.shape[1]), torch.int64),
        ("own_index", own_index, (rows,), torch.int64),
        ("buckets", buckets, (rows,), torch.int64),
        ("members", members, members.shape, members.dtype),
        ("starts", starts, starts.shape, torch.int64),
    ):
        if x.shape != shape or x.dtype != dtype or x.device != queries.device:
            given = f"{x.dtype} {tuple(x.shape)} on {x.device}"
            raise ValueError(f"{name} must be {dtype} {list(shape)} on {queries.device}: got {given}")
    if any(x.stride(1) != 1 for x in (scores, indices, queries, members)):
        raise ValueError("a row of scores, indices, queries and members must be side by side in memory: make them contiguous")


register_operation(
    "nearest_in_buckets(Tensor(a!) scores, Tensor(b!) indices, Tensor queries, Tensor own_index, Tensor buckets, "
    "Tensor members, Tensor starts) -> ()",
    "nearest.triton.nearest_in_buckets",
    lambda *_: None,
)
