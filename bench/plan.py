"""What the host does for a batch: the tile plan, its cost, and how much of what it has computed is useful."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from sbp_kernels import PackedLayout
from sbp_kernels.layout.plan import NARROW, WIDE, build_plan, choose_tiles

from bench.case import Case, Prepared, Tensors
from bench.mixes import MIXES, PARTNERS, Forest, documents, shared_seeds


def plan() -> Iterator[Case]:
    forests: dict[str, Forest] = {f"{name} documents": documents(name, 32768) for name in MIXES}
    even = 32768 // 200
    forests["200 documents"] = ([even] * 199 + [32768 - 199 * even], [-1] * 200)
    forests |= {f"{count} partners a seed": shared_seeds(count, 32768) for count in PARTNERS}
    for name, forest in forests.items():
        yield _case(name, forest)


def _case(name: str, forest: Forest) -> Case:
    layout = PackedLayout.from_tree(*forest)
    until, pairs = layout.visible_until.numpy(), layout.visible_pairs()
    chosen = choose_tiles(until)
    facts = {}
    for title, tiles in (("wide", WIDE), ("narrow", NARROW)):
        computed = build_plan(until, tiles, may_split=True).computed_pairs()
        for side, area in zip(("query", "key"), computed, strict=True):
            facts[f"useful share of the area, {title} tiles, {side} side"] = pairs / area

    def tile_plan(_: Tensors) -> Prepared:
        return Prepared(lambda: build_plan(until, choose_tiles(until), may_split=True), lambda _: {})

    def whole_layout(_: Tensors) -> Prepared:
        return Prepared(lambda: PackedLayout.from_tree(*forest).planned(), lambda _: {})

    def nothing(_: torch.Generator) -> Tensors:
        return {}

    shape = {
        "stream": name,
        "tokens": len(layout),
        "segments": len(forest[0]),
        "tiles": "narrow" if chosen == NARROW else "wide",
    }
    providers = {"plan": tile_plan, "layout and plan": whole_layout}
    return Case(shape, nothing, providers, None, work=1.0, unit="batches", facts=facts)
