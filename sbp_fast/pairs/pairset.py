"""Related pairs of documents, as the stage `pair` writes them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.pipeline.files import atomic_path
from sbp_fast.pipeline.manifest import Manifest

PAIRS = "pairs.parquet"
SCHEMA = pa.schema([("seed", pa.int32()), ("partner", pa.int32()), ("score", pa.float32())])
ROW_GROUP = 1 << 20


class PairSet:
    """Ordered pairs of documents of `corpus.unique`, by (seed, falling score, partner).

    Attributes:
        seeds: int64 [pairs], indices into the unique corpus.
        partners: int64 [pairs], indices into the unique corpus.
        scores: float32 [pairs], cosine similarity.
        fingerprint: of the stage's output.
    """

    def __init__(self, directory: str | Path) -> None:
        self.fingerprint = Manifest.load(Path(directory), "pair", hashed=False).fingerprint
        table = pq.read_table(Path(directory) / PAIRS)
        self.seeds = table["seed"].to_numpy().astype(np.int64)
        self.partners = table["partner"].to_numpy().astype(np.int64)
        self.scores = table["score"].to_numpy()

    def __len__(self) -> int:
        return len(self.seeds)

    def table(self, unique: Corpus) -> pa.Table:
        """Return the pairs as an Arrow table, of which `to_pandas()` and `polars.from_arrow` make a dataframe.

        Args:
            unique: `unique` of the prepared corpus that the pairs are of.

        Returns:
            Columns seed and partner, int64 indices into `unique`; seed_id and partner_id, their ids; score, float32.
        """
        ids = pa.array(unique.ids)
        columns = {"seed": self.seeds, "partner": self.partners}
        named = {f"{name}_id": ids.take(pa.array(rows)) for name, rows in columns.items()}
        return pa.table({**columns, **named, "score": self.scores})

    def groups(self) -> list[tuple[int, np.ndarray]]:
        """Return each seed with its partners, best first."""
        starts = np.flatnonzero(np.diff(self.seeds, prepend=-1))
        return [(int(self.seeds[start]), part) for start, part in zip(starts, np.split(self.partners, starts[1:]), strict=True)]


def write_pairs(directory: Path, parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
    """Write pairs, atomically.

    Args:
        directory: of the stage.
        parts: seeds, partners and scores, [pairs] each, over all parts in the order of `PairSet`. How the pairs are divided
            into parts changes nothing.
    """
    with atomic_path(directory / PAIRS) as temporary, pq.ParquetWriter(temporary, SCHEMA) as writer:
        pending = SCHEMA.empty_table()
        for part in parts:
            pending = pa.concat_tables([pending, pa.table(list(part), names=SCHEMA.names).cast(SCHEMA)])
            while len(pending) >= ROW_GROUP:
                writer.write_table(pending[:ROW_GROUP])
                pending = pending[ROW_GROUP:]
        if len(pending):
            writer.write_table(pending)
