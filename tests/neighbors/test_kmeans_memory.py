"""Memory of the search for centroids: products of one block a thread, however many blocks there are."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import re
from pathlib import Path

import numpy as np

from sbp_fast.neighbors.kmeans import nearest_centroids


def anonymous():  # MiB
    return int(re.search(r"^Anonymous: +([0-9]+)", Path("/proc/self/smaps_rollup").read_text(), re.M)[1]) / 1024


vectors = np.random.default_rng(0).standard_normal((200_000, 16), np.float32)
nearest_centroids(vectors[:100], vectors[:700], 1, threads=2)
before = anonymous()
nearest_centroids(vectors, vectors[:700], 1, threads=2)
print(anonymous() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux, which says what a process holds")
def test_nearest_centroids_of_many_blocks_hold_the_memory_of_few() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 120  # two buffers of 22 MiB; 24 blocks that are allocated and freed in turn leave 300
