"""The part of the kNN self-join that runs on a GPU: the nearest members, among all and within the probed partitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from sbp_kernels import nearest_in_buckets
from torch import Tensor

from bench import machine
from bench.case import Case, Prepared, Provider, Tensors, no_results

Vectors = Callable[[int, torch.Generator], Tensor]
"""Number of vectors and generator -> that many unit vectors."""

NEIGHBOURS = 40  # 32 neighbours, and those that make up for rounding
QUERIES = 4096  # queries whose products with all members are in memory at once
CHECKED = 4000  # members of the checked case, whose products in float64 are all in memory


def nearest(vectors: Vectors) -> Iterator[Case]:
    """Both searches, on CUDA alone: elsewhere the join does not use this operation."""
    if machine.tiny():
        yield _case(vectors, 40, probes=2, checked=40, k=2)
    elif torch.cuda.is_available():
        yield _case(vectors, 200_000, probes=8)
        yield _case(vectors, 50_000, probes=0)


def _case(vectors: Vectors, members: int, *, probes: int, checked: int = CHECKED, k: int = NEIGHBOURS) -> Case:
    """A search of `probes` of about sqrt(members) partitions; where `probes` is 0, of one partition that holds all."""
    partitions = round(members**0.5) if probes else 1

    def inputs(generator: torch.Generator) -> Tensors:
        return _partitioned(vectors(members, generator), partitions, max(probes, 1))

    all_products = _by_all_products(k)
    providers: dict[str, Provider] = {
        "ours": _by_rounds("auto" if machine.tiny() else "triton", k),
        "torch, a partition at a time": _by_rounds("torch", k),
        # exact, so it finds more than a search of some partitions; the difference in time is what those save
        "matmul and topk of all": lambda tensors: (
            Prepared(all_products(tensors).run, no_results) if probes else all_products(tensors)
        ),
    }
    smaller = None if members == checked else _case(vectors, checked, probes=probes, checked=checked, k=k)
    return Case(
        {"members": members, "partitions": partitions, "probes": probes or 1, "neighbours": k},
        inputs,
        providers,
        lambda tensors: {"scores": _exact(tensors, k)},
        work=members,
        unit="queries",
        baselines=("torch, a partition at a time",),
        check=smaller,
    )


def _partitioned(vectors: Tensor, partitions: int, probes: int) -> Tensors:
    """Members sorted by their partition, whose centres are some of the members; probes is int64 [probes, members]."""
    products = vectors @ vectors[: len(vectors) // partitions * partitions : len(vectors) // partitions].T
    order = products.argmax(1).argsort(stable=True)
    ranked = products[order].topk(probes, dim=1).indices
    starts = torch.searchsorted(ranked[:, 0].contiguous(), torch.arange(partitions + 1, device=vectors.device))
    return {"members": vectors[order], "starts": starts, "probes": ranked.T.contiguous()}


def _by_rounds(backend: str, k: int) -> Provider:
    def provider(tensors: Tensors) -> Prepared:
        members = tensors["members"]
        own = torch.arange(len(members), device=members.device)  # index of each query among the members

        def run() -> Tensors:
            scores = torch.full((len(members), k), -torch.inf, device=members.device)
            indices = torch.full((len(members), k), -1, device=members.device)
            for probed in tensors["probes"]:
                nearest_in_buckets(scores, indices, members, own, probed, members, tensors["starts"], backend=backend)
            return {"scores": scores, "indices": indices}

        return Prepared(run, lambda output: {"scores": output["scores"]})

    return provider


def _by_all_products(k: int) -> Provider:
    def provider(tensors: Tensors) -> Prepared:
        members = tensors["members"]

        def run() -> Tensors:
            scores = []
            for first in range(0, len(members), QUERIES):
                products = members[first : first + QUERIES] @ members.T
                products.diagonal(first).fill_(-torch.inf)
                scores.append(products.topk(k, dim=1).values)
            return {"scores": torch.cat(scores)}

        return Prepared(run)

    return provider


def _exact(tensors: Tensors, k: int) -> Tensor:
    members, starts = tensors["members"].double(), tensors["starts"]
    partition = torch.searchsorted(starts, torch.arange(len(members), device=members.device), right=True) - 1
    probed = (partition == tensors["probes"].unsqueeze(2)).any(0).fill_diagonal_(False)
    return (members @ members.T).masked_fill(~probed, -torch.inf).topk(k, dim=1).values
