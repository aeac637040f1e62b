"""Pairs of real documents, by every backend, against the definition worked out by hand."""

import os
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY

from sbp_fast.config import RunConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.neighbors.vectors import Vectors
from sbp_fast.pairs.pairset import PairSet
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages.pair import pair


def runs(tokens: np.ndarray, width: int = 13) -> set[tuple[int, ...]]:
    text = tuple(tokens[1:-1].tolist())
    return {text[i : i + width] for i in range(len(text) - width + 1)} or {text}


def by_hand(run: Path, config: RunConfig) -> set[tuple[int, int]]:
    """Ordered pairs of unique documents in the band, of other originals, neither a near-duplicate of the other."""
    corpus, vectors = PreparedCorpus(run / "prepare"), Vectors(run / "embed")
    unique, matrix = corpus.unique, vectors[np.arange(len(vectors))]
    shingles = [runs(unique[row]) for row in range(len(unique))]
    groups = [corpus.group(str(id)) for id in unique.ids]
    scores, pairs_found = matrix @ matrix.T, set()
    for a in range(len(unique)):
        nearest = [row for row in np.argsort(-scores[a]).tolist() if row != a][: config.pair.neighbors]
        for b in nearest:
            both = len(shingles[a] & shingles[b])
            duplicate = both >= config.pair.near_duplicate_containment * min(len(shingles[a]), len(shingles[b]))
            if scores[a, b] >= config.pair.similarity_low and groups[a] != groups[b] and not duplicate:
                pairs_found |= {(a, b), (b, a)}
    return pairs_found


@pytest.mark.parametrize("backend", ["exact", "ivf", "hnsw"])
def test_every_backend_finds_the_pairs_of_a_brute_force_search(
    backend: str, tiny_config: RunConfig, tiny_run: Path, tmp_path: Path
) -> None:
    uncapped = {"backend": backend, "partners_per_seed": 10_000, "seeds_per_partner": 10_000}
    settings = tiny_config.pair.model_copy(update=uncapped)
    config = tiny_config.model_copy(update={"pair": settings})
    manifest = pair(config, tiny_run / "prepare", tiny_run / "embed", tmp_path / "pairs", console=Console(quiet=True))
    assert sum(manifest.counts["duplicates"].values()) == 0  # or the definition would have to know of them
    pairs = PairSet(tmp_path / "pairs")
    pairs_found, expected = set(zip(pairs.seeds.tolist(), pairs.partners.tolist(), strict=True)), by_hand(tiny_run, config)
    assert len(expected) > 500 and len(pairs_found & expected) >= 0.99 * len(expected)
    assert pairs_found <= expected if backend == "exact" else len(pairs_found - expected) < 0.01 * len(expected)


def test_degree_caps_hold_for_seeds_and_partners(tiny_config: RunConfig, tiny_run: Path) -> None:
    pairs = PairSet(tiny_run / "pair/related")
    assert max(Counter(pairs.seeds.tolist()).values()) == tiny_config.pair.partners_per_seed
    assert max(Counter(pairs.partners.tolist()).values()) == tiny_config.pair.seeds_per_partner


def test_index_on_a_full_disk_is_refused_in_one_line_and_leaves_no_file(tiny_run: Path, tmp_path: Path) -> None:
    """Files are limited to 64 KiB; hnswlib itself reports no error."""
    limit = 64 << 10

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    inputs = ["--corpus", str(tiny_run / "prepare"), "--vectors", str(tiny_run / "embed"), "--out", str(tmp_path / "pairs")]
    command = [sys.executable, "-m", "sbp_fast", "pair", "small", *TINY, *inputs]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, preexec_fn=small_files, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "cannot be written" in done.stderr
    assert not (tmp_path / "pairs").exists() and not list(tmp_path.rglob("*.hnsw*"))
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (
        done.returncode == 0
        and (tmp_path / "pairs/pairs.parquet").read_bytes() == (tiny_run / "pair/related/pairs.parquet").read_bytes()
    )
