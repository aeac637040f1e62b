"""The documents of the shuffled order that stay, counted and read without being written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from sbp_fast.data.holdout import SELECTION_COLUMNS, Decisions, select
from sbp_fast.data.shuffle import ShufflePartition, ShuffleReader, in_first_half

TRAINING_BYTES = 128 << 20  # of text that a tokenizer is trained on; more changes little and its word counts take memory


def count_selected(
    shuffled: ShuffleReader, partitions: list[ShufflePartition], decisions: Decisions
) -> tuple[Counter[str], np.ndarray]:
    """Count the documents that stay for training, and those dropped for each reason.

    Returns:
        The counts, and the hashed name of the original of each held-out document, in the order in which they are written;
        uint64.
    """
    counts: Counter[str] = Counter()
    originals = []
    for partition in partitions:
        table = shuffled.rows(partition, SELECTION_COLUMNS)
        columns = {name: table[name].to_numpy() for name in SELECTION_COLUMNS}
        selected = select(columns, decisions)
        originals.append(decisions.originals(columns)[selected.heldout])
        counts.update(
            train=len(selected.train),
            first_half=int(np.count_nonzero(in_first_half(columns["key"][selected.train]))),
            duplicates=selected.duplicates,
            heldout_duplicates=selected.heldout_duplicates,
            near_duplicates=selected.near_duplicates,
        )
    return counts, np.concatenate(originals)


def head_texts(
    shuffled: ShuffleReader, partitions: list[ShufflePartition], decisions: Decisions, documents: int
) -> Iterator[str]:
    """Yield the texts of the first documents of the shuffled order, up to TRAINING_BYTES of them."""
    size = 0
    for partition in partitions:
        table = shuffled.rows(partition, [*SELECTION_COLUMNS, "text"])
        columns = {name: table[name].to_numpy() for name in SELECTION_COLUMNS}
        selected = select(columns, decisions).train[:documents]
        documents -= len(selected)
        for text in table["text"].take(selected):
            size += len(text.as_buffer())
            yield text.as_py()
            if size >= TRAINING_BYTES:
                return
        if not documents:
            return
