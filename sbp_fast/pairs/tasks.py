"""The stage `pair` at work: what its tasks need, and where the files lie that they hand on.

Documents are numbered as `Documents` has them and cut into ranges of which one fits the memory; what grows with the
neighbours of all documents lies on disk, by range.

    cells/     members-*  found-*                who is in a cell, and the neighbours found there            (joined.py)
    ranges-N/  edges-*  reach-*                  the pairs of which one found the other, and how far each    (gathered.py)
               judged-*  directed-*  nearest-*   each pair once, and what becomes of it                      (judged.py)
               turns-*  sizes-*  taken-*         ordered pairs by the turn in which they may be taken        (capped.py)
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
from sbp_fast.pairs.criteria import FAULTLESS
from sbp_fast.pairs.document_statistics import Documents
from sbp_fast.pipeline.executors.executor import Place
from sbp_fast.pipeline.progress import Console

WORK = "work"
NEIGHBOUR_BYTES = 256  # a document's neighbour in any task, where no pair is found twice and half are kept (docs/log.md)


@dataclass(frozen=True)
class Pairing:
    """What it takes to do any task.

    Attributes:
        low: lower end of the band.
        directory: of the stage.
    """

    config: RunConfig
    documents: Documents
    low: float
    directory: Path
    console: Console
    place: Place

    @property
    def settings(self) -> PairConfig:
        return self.config.pair

    @cached_property
    def ranges(self) -> list[tuple[int, int]]:
        """Of documents, [first, end) each."""
        documents = len(self.documents)
        size = documents * self.settings.neighbours * NEIGHBOUR_BYTES
        count = min(documents, math.ceil(size / (self.settings.memory_gib * 2**30)))
        return list(pairwise(documents * number // count for number in range(count + 1)))

    @property
    def cells(self) -> Path:
        """The folder of the cells' files."""
        return self.directory / WORK / "cells"

    def file(self, kind: str, number: int) -> Path:
        """A file of a range. Other ranges, which another memory makes, have another folder."""
        return self.directory / WORK / f"ranges-{len(self.ranges)}" / f"{kind}-{number:05d}.npy"

    def files(self, kind: str) -> list[Path]:
        """Those of all ranges."""
        return [self.file(kind, number) for number in range(len(self.ranges))]

    def wanted(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Which pairs of documents would be kept if they were found, bool [pairs]."""
        return Candidates.weigh(self.documents, first, second, self.low).judge(self.low, self.settings) == FAULTLESS
