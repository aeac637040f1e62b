"""Random numbers of generation: one stream for each sample of each seed document.

The uniforms come from a counter-based generator keyed by run seed, seed document and sample number, so that a document's
randomness does not depend on the batch it is generated in.
"""

from __future__ import annotations

import numpy as np
import xxhash


def document_uniforms(run_seed: int, document: int, sample: int, count: int) -> np.ndarray:
    """Return the stream of one sample of one seed document: float64 [count] in [0, 1) (Philox; Salmon et al. 2011)."""
    key = np.array([run_seed, document], dtype=np.int64).view(np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, sample])).random(count)


def document_seed(run_seed: int, document: int, sample: int) -> int:
    """Return a seed in [0, 2**63) for another library's random numbers, of one sample of one seed document."""
    return xxhash.xxh3_64_intdigest(f"{run_seed}/{document}/{sample}".encode()) >> 1
