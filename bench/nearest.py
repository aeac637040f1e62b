"""What a GPU does of the self-join: the nearest members, among all and within the buckets that are probed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from sbp_kernels import nearest_in_buckets
from torch import Tensor

from bench.case import Case, Prepared, Provider, Tensors

Vectors = Callable[[int, torch.Generator], Tensor]
"""Unit vectors, as many as asked for."""

FOUND = 40  # 32 neighbours, and those that make up for rounding
QUERIES = 4096  # whose products with all members are held at once, where they are
CHECKED = 4000  # members, where all products in float64 are held


def nearest(vectors: Vectors) -> Iterator[Case]:
    """On CUDA alone: elsewhere the join does not use this operation."""
    if torch.cuda.is_available():
        yield _case(vectors, 200_000, probes=8, importance=0)
        yield _case(vectors, 50_000, probes=0, importance=1)


def _case(vectors: Vectors, members: int, *, probes: int, importance: int = 0, checked: int = CHECKED, k: int = FOUND) -> Case:
    """`probes` of about sqrt(members) buckets, or, if it is 0, one bucket of all."""
    buckets = round(members**0.5) if probes else 1

    def inputs(generator: torch.Generator) -> Tensors:
        return _in_buckets(vectors(members, generator), buckets, max(probes, 1))

    all_products = _by_all_products(k)
    providers: dict[str, Provider] = {
        "ours": _by_rounds("triton", k),
        "torch, a bucket at a time": _by_rounds("torch", k),
        # finds more than the buckets do: its time is what they save
        "matmul and topk of all": lambda given: (
            Prepared(all_products(given).run, lambda _: {}) if probes else all_products(given)
        ),
    }
    smaller = None if members == checked else _case(vectors, checked, probes=probes, checked=checked, k=k)
    return Case(
        {"members": members, "buckets": buckets, "probes": probes or 1, "found": k},
        inputs,
        providers,
        lambda given: {"scores": _exact(given, k)},
        work=members,
        unit="queries",
        judges=("torch, a bucket at a time",),
        check=smaller,
        importance=importance,
    )


def _in_buckets(vectors: Tensor, buckets: int, probes: int) -> Tensors:
    """Members in the order of their buckets, those of the nearest of some members that are drawn; probes [probes, members]."""
    products = vectors @ vectors[: len(vectors) // buckets * buckets : len(vectors) // buckets].T
    order = products.argmax(1).argsort(stable=True)
    ranked = products[order].topk(probes, dim=1).indices
    starts = torch.searchsorted(ranked[:, 0].contiguous(), torch.arange(buckets + 1, device=vectors.device))
    return {"members": vectors[order], "starts": starts, "probes": ranked.T.contiguous()}


def _by_rounds(backend: str, k: int) -> Provider:
    def provider(given: Tensors) -> Prepared:
        members, own = given["members"], torch.arange(len(given["members"]), device=given["members"].device)

        def run() -> Tensors:
            scores = torch.full((len(members), k), -torch.inf, device=members.device)
            places = torch.full((len(members), k), -1, device=members.device)
            for buckets in given["probes"]:
                nearest_in_buckets(scores, places, members, own, buckets, members, given["starts"], backend=backend)
            return {"scores": scores, "places": places}

        return Prepared(run, lambda found: {"scores": found["scores"]})

    return provider


def _by_all_products(k: int) -> Provider:
    def provider(given: Tensors) -> Prepared:
        members = given["members"]

        def run() -> Tensors:
            found = []
            for first in range(0, len(members), QUERIES):
                products = members[first : first + QUERIES] @ members.T
                products.diagonal(first).fill_(-torch.inf)
                found.append(products.topk(k, dim=1).values)
            return {"scores": torch.cat(found)}

        return Prepared(run)

    return provider


def _exact(given: Tensors, k: int) -> Tensor:
    members, starts = given["members"].double(), given["starts"]
    bucket = torch.searchsorted(starts, torch.arange(len(members), device=members.device), right=True) - 1
    shown = (bucket == given["probes"].unsqueeze(2)).any(0).fill_diagonal_(False)
    return (members @ members.T).masked_fill(~shown, -torch.inf).topk(k, dim=1).values
