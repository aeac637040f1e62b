"""`pair` on the whole default corpus, and on the first 20,000 documents of another, against all products."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sbp_fast.config import RunConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.dedup.shingles import DocumentShingles
from sbp_fast.neighbors.vectors import Vectors
from sbp_fast.pairs.pairset import PairSet
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages.embed import embed
from sbp_fast.stages.pair import pair
from sbp_fast.stages.prepare import prepare

CORPORA = {"default": "embedded:default", "mini": os.environ.get("SBP_FAST_MINI", "")}
DOCUMENTS = 20_000
UNCAPPED = {"partners_per_seed": 1000, "seeds_per_partner": 100_000}


@pytest.fixture(scope="module", params=list(CORPORA))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not CORPORA[request.param]:
        pytest.skip("SBP_FAST_MINI names no corpus to take 20,000 documents from")
    folder = tmp_path_factory.mktemp(request.param)
    config = configured(CORPORA[request.param], {})
    prepare(config, folder / "corpus", console=Console(quiet=True))
    embed(config, folder / "corpus", folder / "vectors", console=Console())
    return folder


def configured(path: str, pairs: dict[str, Any], threads: int = 1) -> RunConfig:
    corpus = {"path": path, "unique_share": 1.0, "maximum_documents": DOCUMENTS, "vocabulary_size": 4096}
    corpus |= {"passage_characters": 2400} if path.startswith("embedded") else {}
    return RunConfig.model_validate(
        {"threads": threads, "corpus": corpus, "embed": {"maximum_tokens": 64}, "pair": {**UNCAPPED, **pairs}}
    )


def paired(run: Path, name: str, threads: int = 1, **pairs: Any) -> tuple[Manifest, set[tuple[int, int]]]:
    config = configured("", pairs, threads)
    manifest = pair(config, run / "corpus", run / "vectors", run / name, console=Console(quiet=True))
    found = PairSet(run / name)
    return manifest, set(zip(found.seeds.tolist(), found.partners.tolist(), strict=True))


def by_brute_force(run: Path, manifest: Manifest) -> set[tuple[int, int]]:
    """All ordered pairs of distinct documents that qualify; either may be among the other's nearest."""
    import pyarrow.parquet as pq

    prepared, vectors = PreparedCorpus(run / "corpus"), Vectors(run / "vectors")
    unique, settings = prepared.unique, configured("", {}).pair
    rows = np.setdiff1d(np.arange(len(unique)), pq.read_table(run / "exact/duplicates.parquet")["document"].to_numpy())
    matrix = torch.from_numpy(vectors[rows])
    groups = np.unique([prepared.group(str(id)) for id in unique.ids[rows]], return_inverse=True)[1]
    keys = set()
    for start in range(0, len(rows), 1000):
        own = np.arange(start, min(start + 1000, len(rows)))
        scores = matrix[own] @ matrix.T
        scores[torch.arange(len(own)), torch.from_numpy(own)] = -2
        best = scores.topk(settings.neighbors, dim=1)
        inside = (best.values >= manifest.counts["band"]["low"]).numpy()
        first, second = np.repeat(own, inside.sum(1)), best.indices.numpy()[inside]
        keys.update(zip(np.minimum(first, second).tolist(), np.maximum(first, second).tolist(), strict=True))
    first, second = np.array(sorted(keys)).T
    differ = groups[first] != groups[second]
    first, second = first[differ], second[differ]
    shingles = DocumentShingles(len(rows), lambda row: unique[int(rows[row])][1:-1], settings.shingle_tokens)
    alone = np.maximum(*shingles.containment(first, second)) < settings.near_duplicate_containment
    ends = rows[first[alone]].tolist(), rows[second[alone]].tolist()
    return set(zip(*ends, strict=True)) | set(zip(*reversed(ends), strict=True))


@pytest.mark.slow
def test_every_backend_partitioned_or_not_finds_the_pairs_of_real_documents(run: Path) -> None:
    exact, all_pairs = paired(run, "exact", backend="exact")
    expected = by_brute_force(run, exact)
    assert len(expected) > 10_000 and len(all_pairs & expected) >= 0.9999 * len(expected)
    assert len(all_pairs - expected) <= 0.0001 * len(expected)  # at the edge of the k nearest and of the band, by rounding
    for backend in ("ivf", "hnsw"):
        manifest, found = paired(run, backend, backend=backend)
        recall = len(found & all_pairs) / len(all_pairs)
        budgets = manifest.counts["self_join"]["search_budgets"]
        print(f"{run.name}: {backend} finds {recall:.4f} of {len(all_pairs)} pairs, search budgets {budgets}")
        assert recall >= 0.99 and manifest.counts["recall"]["recall"] >= 0.99
        assert len(found - all_pairs) <= 0.01 * len(all_pairs)  # who are the k nearest differs where some are not found
        assert paired(run, f"{backend}-2", threads=2, backend=backend)[0].fingerprint == manifest.fingerprint
    manifest, found = paired(run, "partitioned", backend="ivf", partition_documents=8000, memory_gib=0.02)
    recall = len(found & all_pairs) / len(all_pairs)
    print(f"{run.name}: {manifest.counts['self_join']['partitions']} partitions find {recall:.4f}")
    assert manifest.counts["self_join"]["partitions"] > 5 and recall >= 0.99


@pytest.mark.slow
def test_degree_caps_hold_for_real_documents(run: Path) -> None:
    _, everything = paired(run, "exact", backend="exact")
    manifest, kept = paired(run, "capped", backend="exact", partners_per_seed=4, seeds_per_partner=4)
    partners_of, seeds_of = (Counter(pair[end] for pair in kept) for end in (0, 1))
    assert kept < everything and max(partners_of.values()) == max(seeds_of.values()) == 4
    left_out = everything - kept
    assert all(partners_of[seed] == 4 or seeds_of[partner] == 4 for seed, partner in left_out)
    assert len(left_out) == manifest.counts["dropped"]["seed_cap"] + manifest.counts["dropped"]["partner_cap"]
