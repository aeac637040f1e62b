"""The lab's metric: nats a told value of held-out documents over those of one who knows the truth."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from sbp_fast.config import RunConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.evaluate.likelihood import Tree
from sbp_fast.evaluate.metrics import METRICS, Items, Metric, score_rows
from sbp_fast.lab.files import load_world
from sbp_fast.lab.worlds import FACTS, JOINED, WORDS, Documents, World
from sbp_fast.pipeline.files import hash_value
from sbp_fast.pipeline.progress import Console

EXCESS = "excess_unlinked"
"""On the J1 documents of unlinked concepts, which no unique document tells under their name."""
EXCESS_LINKED = "excess_linked"
FIRST_VALUE = 1 + WORDS - FACTS
"""Index of a document's first value among its tokens, of which the first begins the document."""


def excess(config: RunConfig, prepared: PreparedCorpus, console: Console) -> list[Metric]:
    """Return the excess on held-out J1 documents of unlinked and of linked concepts; nothing for a corpus of no world."""
    world = load_world(config)
    if world is None:
        return []
    labels = {EXCESS: (False, "Excess, unlinked concepts"), EXCESS_LINKED: (True, "Excess, linked concepts")}
    fingerprint = hash_value(str(world.settings))
    return [
        Metric(name, label, "lower", "documents", 3, partial(_items, world, name, linked), fingerprint=fingerprint)
        for name, (linked, label) in labels.items()
    ]


def _items(world: World, name: str, linked: bool, prepared: PreparedCorpus, context: int) -> Items:
    heldout, told = prepared.heldout, read_corpus(world, prepared, prepared.heldout)
    chosen = np.flatnonzero((told.genres == JOINED) & (world.linked[told.concepts] == linked))
    trees = [value_tree(heldout[int(document)], owner) for owner, document in enumerate(chosen)]
    exact = np.log(world.probabilities(told)[chosen]).sum(1)

    def to_rows(nats: np.ndarray) -> pa.Table:
        values = np.full(len(chosen), FACTS)
        return score_rows(name, heldout.ids[chosen], heldout.sources[chosen], exact - nats, values)

    return Items(trees, len(chosen), to_rows)


def read_corpus(world: World, prepared: PreparedCorpus, corpus: Corpus) -> Documents:
    """Return what the documents of a corpus tell."""
    told, _ = world.read([prepared.text(corpus, index) for index in range(len(corpus))])
    return told


def value_tree(document: np.ndarray, owner: int, before: Sequence[np.ndarray] = ()) -> Tree:
    """Return the tree that scores the values of a document, as one sum, after a chain of segments that stand before it."""
    segments = [*before, document[:-1]]
    first = sum(map(len, before)) + FIRST_VALUE - 1
    targets = np.asarray(document[FIRST_VALUE : FIRST_VALUE + FACTS], np.int64)
    return Tree(segments, list(range(-1, len(before))), np.arange(first, first + FACTS), targets, np.full(FACTS, owner))


METRICS.register("lab excess", excess)
