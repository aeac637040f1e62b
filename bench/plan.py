"""The host's work for a batch: the time of the tile plan, and the useful share of the area that its tiles cover."""

from __future__ import annotations

from collections.abc import Iterator

from sbp_kernels import PackedLayout
from sbp_kernels.plan import NARROW, WIDE, build_plan, choose_tiles

from bench.case import Case, Prepared, Tensors, no_inputs, no_results
from bench.length_distributions import LENGTH_DISTRIBUTIONS, PARTNER_COUNTS, SegmentTree, documents, shared_seeds

TOKENS = 32_768


def plan() -> Iterator[Case]:
    """Documents of every length distribution and of one length, and shared seeds."""
    trees: dict[str, SegmentTree] = {f"{name} documents": documents(name, TOKENS) for name in LENGTH_DISTRIBUTIONS}
    even = TOKENS // 200
    trees["200 documents"] = ([even] * 199 + [TOKENS - 199 * even], [-1] * 200)
    trees |= {f"{count} partners a seed": shared_seeds(count, TOKENS) for count in PARTNER_COUNTS}
    for name, tree in trees.items():
        yield _case(name, tree)


def _case(name: str, tree: SegmentTree) -> Case:
    layout = PackedLayout.from_tree(*tree)
    until, pairs = layout.visible_until.numpy(), layout.visible_pairs()
    chosen = choose_tiles(until)
    useful = {}
    for title, tiles in (("wide", WIDE), ("narrow", NARROW)):
        computed = build_plan(until, tiles, may_split=True).computed_pairs()
        for side, area in zip(("query", "key"), computed, strict=True):
            useful[f"useful share of the area, {title} tiles, {side} side"] = pairs / area

    def tile_plan(_: Tensors) -> Prepared:
        return Prepared(lambda: build_plan(until, choose_tiles(until), may_split=True), no_results)

    def whole_layout(_: Tensors) -> Prepared:
        return Prepared(lambda: PackedLayout.from_tree(*tree).planned(), no_results)

    shape = {
        "lengths": name,
        "tokens": len(layout),
        "segments": len(tree[0]),
        "tiles": "narrow" if chosen == NARROW else "wide",
    }
    providers = {"plan": tile_plan, "layout and plan": whole_layout}
    return Case(shape, no_inputs, providers, None, work=1.0, unit="batches", statistics=useful)
