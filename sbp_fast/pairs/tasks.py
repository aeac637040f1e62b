"""The tasks of the stage `pair`: what they need, and the files that they hand on.

Documents are numbered as in `DistinctDocuments` and divided into ranges of which one fits into memory. What grows with the
neighbors of all documents is on disk, by range.

    partitions/  members-*  neighbors-*            partitioned_self_join.py   documents, and their neighbors in the partition
    ranges-N/    edges-*  reach-*                  gather.py                  pairs that either document found
                 scored-*  directed-*  nearest-*   score.py                   each pair once, with the reject reason
                 ranked-*  sizes-*  taken-*        caps.py                    ordered pairs by their rank within the seed
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from sbp_fast.config import PairConfig, RunConfig
from sbp_fast.pairs.candidates import Candidates
from sbp_fast.pairs.criteria import ACCEPTED
from sbp_fast.pairs.document_statistics import DistinctDocuments
from sbp_fast.pipeline.executors.executor import Placement
from sbp_fast.pipeline.progress import Console

NEIGHBOR_BYTES = 256  # of a document's neighbor in any task, if no pair is found twice and half are accepted (docs/log.md)


@dataclass(frozen=True)
class Pairing:
    """What every task needs.

    Attributes:
        config: of the run.
        documents: to pair.
        low: lower end of the band.
        directory: for the results.
        scratch: for the files that tasks hand on.
        console: shows the progress.
        place: where the tasks run.
    """

    config: RunConfig
    documents: DistinctDocuments
    low: float
    directory: Path
    scratch: Path
    console: Console
    placement: Placement

    @property
    def settings(self) -> PairConfig:
        """The settings of `pair`."""
        return self.config.pair

    @cached_property
    def ranges(self) -> list[tuple[int, int]]:
        """Half-open ranges of document indices, one per task."""
        documents = len(self.documents)
        size = documents * self.settings.neighbors * NEIGHBOR_BYTES
        count = min(documents, math.ceil(size / (self.settings.memory_gib * 2**30)))
        return list(pairwise(documents * number // count for number in range(count + 1)))

    @property
    def partitions(self) -> Path:
        """The folder of the partitions' files."""
        return self.scratch / "partitions"

    def file(self, kind: str, number: int) -> Path:
        """Return the path of a file of a range. Another memory size makes other ranges, which have another folder."""
        return self.scratch / f"ranges-{len(self.ranges)}" / f"{kind}-{number:05d}.npy"

    def files(self, kind: str) -> list[Path]:
        """Return the paths of the files of all ranges."""
        return [self.file(kind, number) for number in range(len(self.ranges))]

    def qualify(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Return which pairs of documents no criterion rejects, bool [pairs]."""
        candidates = Candidates.measure(self.documents, first, second, self.low)
        return candidates.reject_reasons(self.low, self.settings) == ACCEPTED
