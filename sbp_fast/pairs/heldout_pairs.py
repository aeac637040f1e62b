"""Pairs of held-out documents, which neither the base model nor the synthesizer has seen: the file that holds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import atomic_path

HELDOUT_PAIRS = "heldout-pairs.parquet"
PairSplit = Literal["validation", "test"]
SCHEMA = pa.schema(
    [
        ("seed", pa.int64()),
        ("partner", pa.int64()),
        ("similarity", pa.float32()),
        ("split", pa.string()),
        ("other_seed", pa.int64()),
    ]
)
MAXIMUM_DOCUMENTS = 4096
"""Documents of a split among which pairs are looked for: an exact search of so many takes seconds, each meets as many related
ones by chance alone as it may have partners (0.2% of them, 8), and a thousand give intervals of a thousandth of a nat."""
MINIMUM_PAIRS = 20
"""With fewer pairs of a split an interval means nothing."""
NO_SEED = -1
SWAP_BLOCK = 1024


@dataclass(frozen=True)
class HeldoutPairs:
    """Ordered pairs of held-out documents; both documents of a pair are of the same split. Arrays of [pairs].

    Attributes:
        seeds: int64, indices into the corpus `heldout`.
        partners: int64, indices into the corpus `heldout`.
        similarities: float32, cosine similarity of the two.
        splits: str, "validation" or "test".
        other_seeds: int64, the seed of another pair of the split that is unrelated to the partner (see `assign_other_seeds`);
            `NO_SEED` where there is none.
    """

    seeds: np.ndarray
    partners: np.ndarray
    similarities: np.ndarray
    splits: np.ndarray
    other_seeds: np.ndarray

    def __len__(self) -> int:
        return len(self.seeds)

    @staticmethod
    def load(directory: str | Path) -> HeldoutPairs:
        """Read the pairs that a stage wrote.

        Raises:
            UserError: the stage wrote none.
        """
        path = Path(directory) / HELDOUT_PAIRS
        if not path.is_file():
            raise UserError(directory, "has no pairs of held-out documents", "run pair again with --force")
        table = pq.read_table(path)
        return HeldoutPairs(*(table[name].to_numpy(zero_copy_only=False) for name in SCHEMA.names))

    @staticmethod
    def concatenate(parts: list[HeldoutPairs]) -> HeldoutPairs:
        """Return the pairs of all parts, one after the other."""
        names = HeldoutPairs.__dataclass_fields__
        return HeldoutPairs(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def write(self, directory: Path) -> None:
        """Write the pairs into the directory of a stage, atomically."""
        columns = [self.seeds, self.partners, self.similarities, pa.array(self.splits.tolist(), pa.string()), self.other_seeds]
        with atomic_path(directory / HELDOUT_PAIRS) as temporary:
            pq.write_table(pa.table(columns, names=SCHEMA.names).cast(SCHEMA), temporary)

    def select(self, chosen: np.ndarray) -> HeldoutPairs:
        """Return the pairs that a boolean mask, or an array of indices, chooses."""
        return HeldoutPairs(*(getattr(self, name)[chosen] for name in HeldoutPairs.__dataclass_fields__))

    def of_split(self, split: PairSplit) -> HeldoutPairs:
        """Return the pairs of one split."""
        return self.select(self.splits == split)


def assign_other_seeds(
    seeds: np.ndarray, partners: np.ndarray, unrelated: Callable[[np.ndarray, np.ndarray], np.ndarray], keys: np.ndarray
) -> np.ndarray:
    """Return for each pair the seed of another pair, unrelated to this pair's partner: a derangement of the seeds.

    Every seed is assigned as often as it has partners, so own and other seeds are the same documents. The pairs are put in the
    order of their keys, and each gets the seed of the one before it. A pair whose seed is then related to its partner swaps
    with the first pair in that order that leaves both with unrelated seeds.

    Args:
        seeds: int64 [pairs].
        partners: int64 [pairs].
        unrelated: (seeds, partners) -> bool [pairs]; false for a partner with its own seed.
        keys: uint64 [pairs], hashes that decide the order.

    Returns:
        int64 [pairs]; `NO_SEED` where no swap is possible.
    """
    order = np.argsort(keys, kind="stable")
    others = np.empty_like(seeds)
    others[order] = np.roll(seeds[order], 1)
    valid = unrelated(others, partners)
    for pair in order[~valid[order]].tolist():
        if valid[pair]:
            continue  # an earlier swap has given it an unrelated seed
        for start in range(0, len(order), SWAP_BLOCK):
            block = order[start : start + SWAP_BLOCK]
            fits = unrelated(others[block], np.repeat(partners[pair], len(block)))
            fits &= unrelated(np.repeat(others[pair], len(block)), partners[block])
            if fits.any():
                other = block[np.argmax(fits)]
                others[[pair, other]] = others[[other, pair]]
                valid[[pair, other]] = True
                break
    return np.where(valid, others, NO_SEED)
