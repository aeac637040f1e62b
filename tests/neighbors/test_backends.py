"""kNN backends by name: the registry, and `pair` with a backend from outside the package."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paired_documents import UNCAPPED, as_set, make_documents, make_vectors, run_pair, write_inputs

from sbp_fast.config import PairConfig
from sbp_fast.config.files import load_config
from sbp_fast.errors import UserError
from sbp_fast.experiment import costs
from sbp_fast.neighbors.backends import BACKENDS, KnnBackend, KnnSearcher, choose_backend


class SortSearcher(KnnSearcher):
    """All products, sorted."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors

    def search(self, rows: np.ndarray, k: int, search_budget: int = 0, task: Any = None) -> tuple[np.ndarray, np.ndarray]:
        scores = self.vectors[rows] @ self.vectors.T
        scores[np.arange(len(rows)), rows] = -np.inf
        ids = np.argsort(-scores, axis=1, kind="stable")[:, : min(k, len(self.vectors) - 1)]
        missing = ((0, 0), (0, k - ids.shape[1]))
        products = np.take_along_axis(scores, ids, axis=1)
        return np.pad(ids, missing, constant_values=-1), np.pad(products, missing, constant_values=-np.inf)


class SortBackend(KnnBackend):
    """A backend as a user would write it."""

    uses_device = False

    def open(self, vectors: np.ndarray, ids: np.ndarray, config: PairConfig, **options: Any) -> KnnSearcher:
        return SortSearcher(vectors)

    def core_seconds(self, documents: float, dimension: int) -> float:
        return 7.0


@pytest.fixture
def sort_backend() -> Iterator[str]:
    BACKENDS.register("sort", SortBackend())
    yield "sort"
    BACKENDS.unregister("sort")


def test_backend_registered_from_outside_finds_the_pairs_of_the_exact_one(sort_backend: str, tmp_path: Path) -> None:
    write_inputs(tmp_path, *make_documents(0), make_vectors(0))
    settings = {"similarity_low": 0.2, **UNCAPPED}
    pairs, counts = run_pair(tmp_path, "sorted", backend=sort_backend, **settings)
    exact, _ = run_pair(tmp_path, "exact", backend="exact", **settings)
    assert as_set(pairs) == as_set(exact) and counts["self_join"]["backend"] == "sort" and counts["recall"]["recall"] == 1.0


def test_plan_counts_the_core_seconds_of_a_backend_registered_from_outside(sort_backend: str) -> None:
    def pair_seconds(backend: str) -> float:
        return costs.pair(load_config(["small"], [f"pair.backend={backend}"]), corpus).core_seconds

    corpus = costs.CorpusEstimate.guess(load_config(["small"]))
    documents = corpus.unique_documents
    difference = 7.0 - BACKENDS["hnsw"].core_seconds(documents, 384)
    assert pair_seconds(sort_backend) - pair_seconds("hnsw") == pytest.approx(documents * difference)


def test_backend_registered_twice_is_refused(sort_backend: str) -> None:
    with pytest.raises(ValueError, match=r"pair.backend 'sort' is registered twice"):
        BACKENDS.register("sort", SortBackend())


def test_unknown_backend_is_one_error_that_lists_the_known_and_leaves_no_output(tmp_path: Path) -> None:
    words = r"pair.backend 'hsnw': is unknown; did you mean hnsw\? known: exact, ivf, hnsw"
    config = load_config(["small"], ["pair.backend=hsnw"])
    with pytest.raises(UserError, match=words):
        choose_backend(config.pair, 100)
    with pytest.raises(UserError, match=words):
        costs.pair(config, costs.CorpusEstimate.guess(config))
    with pytest.raises(UserError, match=words):
        run_pair(tmp_path, backend="hsnw")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("old", "new"), [("bucket", "ivf"), ("hnswlib", "hnsw")])
def test_renamed_backend_is_refused_with_its_new_name(old: str, new: str) -> None:
    with pytest.raises(UserError, match=rf"pair.backend = {old} is not usable: it has a new name, {new}; correct the value"):
        load_config(["small"], [f"pair.backend={old}"])


def test_renamed_keys_are_refused_with_the_new_ones() -> None:
    for old, new in (("bucket_probes", "nprobe"), ("cell_documents", "partition_documents"), ("keep_index", "save_index")):
        with pytest.raises(UserError, match=rf"pair.{old} has a new name; write it as pair.{new}"):
            load_config(["small"], [f"pair.{old}=1"])
