"""Every kNN backend against all products, sorted."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from clustered import as_stage, clustered_vectors, unit_vectors

from sbp_fast.config import PairConfig
from sbp_fast.errors import UserError
from sbp_fast.neighbors import exact
from sbp_fast.neighbors.backends import choose_backend
from sbp_fast.neighbors.exact import ExactSearcher, exact_neighbors
from sbp_fast.neighbors.hnsw import HnswSearcher
from sbp_fast.neighbors.ivf import IvfSearcher
from sbp_fast.neighbors.kmeans import balancing_prices, nearest_centroids, train_centroids
from sbp_fast.neighbors.partition import MergedNeighbors, _choose, assign_partitions
from sbp_fast.neighbors.self_join import RecallSample, SelfJoinResult, self_join
from sbp_fast.neighbors.top_k import NO_NEIGHBOR, TopKHeaps, inner_products
from sbp_fast.pipeline.progress import Console

LOW = 0.7  # of the band in these tests
BACKENDS = ("exact", "ivf", "hnsw")


def brute_force(vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """By float64 products and a full sort."""
    scores = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    np.fill_diagonal(scores, -np.inf)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, : min(k, len(vectors) - 1)]
    return ids, np.take_along_axis(scores, ids, axis=1)


def run(vectors: np.ndarray, backend: Any, threads: int = 1, seed: int = 0, **settings: Any) -> SelfJoinResult:
    def counted(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return inner_products(vectors, first, vectors, second) >= LOW

    config = PairConfig.model_validate({"neighbors": 20, "recall_queries": 300, "backend": backend, **settings})
    ids, quiet = np.arange(len(vectors)), Console(quiet=True)
    options = {"backend": backend, "counted": counted, "seed": seed, "threads": threads, "device": "cpu", "console": quiet}
    return self_join(vectors, ids, config, **options)


def pair_recall(found: np.ndarray, vectors: np.ndarray, k: int = 20) -> float:
    """Of the pairs in the band, how many at least one side found."""
    ids, scores = brute_force(vectors, k)
    rows, columns = np.nonzero(scores >= LOW)
    others = ids[rows, columns]
    forward = (found[rows] == others[:, None]).any(axis=1)
    backward = (found[others] == rows[:, None]).any(axis=1)
    assert len(rows) > len(vectors)
    return float((forward | backward).mean())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(3))
def test_pairs_in_the_band_are_found(backend: str, seed: int) -> None:
    vectors = clustered_vectors(4000, seed=seed)
    found = run(vectors, backend, seed=seed)
    assert found.recall >= 0.99
    assert pair_recall(found.ids, vectors) >= 0.99
    assert not (found.ids == np.arange(4000)[:, None]).any()
    assert all(len(set(row)) == 20 for row in found.ids.tolist())
    scores = (vectors[:, None, :].astype(np.float64) * vectors[found.ids]).sum(axis=2)
    assert np.abs(found.similarities - scores).max() < 1e-6
    assert (np.diff(found.similarities, axis=1) <= 0).all()


def test_exact_self_join_equals_a_full_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = clustered_vectors(500)
    monkeypatch.setitem(exact.QUERY_BLOCK, "cpu", 64)
    monkeypatch.setattr(exact, "MEMBER_BLOCK", 77)
    found = run(vectors, "exact")
    ids, scores = brute_force(vectors, 20)
    assert (found.ids == ids).all() and found.search_budget == 0
    assert np.abs(found.similarities - scores).max() < 1e-6
    rows = np.array([3, 499, 0])
    blocks = [(np.arange(start, min(start + 90, 500)), vectors[start : start + 90]) for start in range(0, 500, 90)]
    few, products = exact_neighbors(vectors[rows], rows, blocks, 20)
    assert (few == ids[rows]).all() and (products == found.similarities[rows]).all()


def test_ivf_that_probes_every_bucket_is_exact() -> None:
    vectors = clustered_vectors(1500)
    searcher = IvfSearcher(vectors, seed=0, threads=1)
    ids, scores = searcher.search(np.arange(1500), 20, searcher.search_budgets[-1])
    assert (ids == brute_force(vectors, 20)[0]).all()
    rows = np.array([1400, 3, 77])
    few, products = searcher.search(rows, 20, searcher.search_budgets[-1])
    assert (few == ids[rows]).all() and (products == scores[rows]).all()


@pytest.mark.parametrize("make_searcher", [ExactSearcher, partial(IvfSearcher, seed=0)])
def test_rounds_on_a_device_find_the_neighbors_that_heaps_find(make_searcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the device is the CPU, where the operation of the rounds is plain torch."""
    vectors, rows = clustered_vectors(1500), np.random.default_rng(0).permutation(1500)[:900]
    searcher = make_searcher(vectors, threads=2)
    budgets = searcher.search_budgets or (0,)
    by_heaps = [searcher.search(rows, 20, budget) for budget in budgets]
    monkeypatch.setattr(type(searcher), "_on_cpu", type(searcher)._on_device)
    monkeypatch.setattr(f"{type(searcher).__module__}.QUERY_BLOCK", {"cpu": 400})
    for budget, heaps in zip(budgets, by_heaps, strict=True):
        rounds = searcher.search(rows, 20, budget)
        assert (rounds[0] == heaps[0]).all() and (rounds[1] == heaps[1]).all()
    few = make_searcher(vectors[:9], threads=1).search(np.arange(9), 20, 1)[0]
    assert [sorted(row[:8]) for row in few.tolist()] == [[i for i in range(9) if i != row] for row in range(9)]
    assert (few[:, 8:] == NO_NEIGHBOR).all()


@pytest.mark.gpu
def test_gpu_finds_the_neighbors_that_the_cpu_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = clustered_vectors(20_000, dimension=384)
    rows = np.random.default_rng(0).permutation(20_000)
    ids, scores = ExactSearcher(vectors, threads=2).search(rows, 32)
    for searcher in (ExactSearcher(vectors, threads=2, device="cuda"), IvfSearcher(vectors, seed=0, threads=2, device="cuda")):
        found, products = searcher.search(rows, 32, searcher.search_budgets[-1] if searcher.search_budgets else 0)
        assert (found == ids).all() and (products == scores).all()
    # a vector between two centroids may have either by rounding, so both devices are given those of the CPU
    monkeypatch.setattr("sbp_fast.neighbors.ivf.nearest_centroids", lambda *a, device, **o: nearest_centroids(*a, **o))
    monkeypatch.setattr("sbp_fast.neighbors.ivf.train_centroids", lambda *a, device, **o: train_centroids(*a, **o))
    searchers = [IvfSearcher(vectors, seed=0, threads=2, device=device) for device in ("cpu", "cuda")]
    for budget in searchers[0].search_budgets[:3]:
        cpu, cuda = (searcher.search(rows, 32, budget) for searcher in searchers)
        assert (cpu[0] == cuda[0]).all() and (cpu[1] == cuda[1]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_and_reruns_change_nothing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbp_fast.neighbors.ivf.QUERY_BLOCK", {"cpu": 500})
    vectors = clustered_vectors(3000)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    one, two, again = (run(vectors, backend, threads=threads) for threads in (1, 2, 1))
    for other in (two, again):
        assert (one.ids == other.ids).all() and (one.similarities == other.similarities).all()
        assert (one.search_budget, one.recall) == (other.search_budget, other.recall)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fewer_documents_than_neighbors(backend: str) -> None:
    found = run(unit_vectors(18, 4), backend)
    assert found.ids.shape == (18, 20)
    assert [sorted(row[:17]) for row in found.ids.tolist()] == [[i for i in range(18) if i != row] for row in range(18)]
    assert (found.ids[:, 17:] == NO_NEIGHBOR).all() and np.isneginf(found.similarities[:, 17:]).all()


def test_equal_vectors_are_neighbors_and_hnsw_refuses_them() -> None:
    vectors = np.concatenate([unit_vectors(40, 8)] * 2)
    for backend in ("exact", "ivf"):
        found = run(vectors, backend, neighbors=3)
        assert (found.ids[:, 0] == (np.arange(80) + 40) % 80).all()
    with pytest.raises(ValueError, match="remove duplicates"):
        run(vectors, "hnsw")


def test_heaps_keep_the_greatest_products() -> None:
    generator = np.random.default_rng(0)
    own = np.array([5, 0, 63, NO_NEIGHBOR])
    scores = generator.permutation(4 * 64).reshape(4, 64).astype(np.float32)
    best = TopKHeaps(own, 7)
    for members in np.array_split(generator.permutation(64), 9):
        for queries in (np.array([3, 0]), np.array([1, 2])):
            shown = torch.from_numpy(scores[np.ix_(queries, members)])
            best.add(shown, torch.from_numpy(queries), torch.from_numpy(members))
    scores[[0, 1, 2], own[:3]] = -1
    assert [sorted(row) for row in best.ids.tolist()] == [sorted(row) for row in np.argsort(-scores, axis=1)[:, :7].tolist()]


def test_inner_products_have_the_same_bits_in_both_directions_and_anywhere() -> None:
    vectors = unit_vectors(200, 384)
    first, second = np.random.default_rng(1).integers(200, size=(2, 1000))
    forward = inner_products(vectors, first, vectors, second)
    assert (forward == inner_products(vectors, second, vectors, first)).all()
    places = np.arange(1000)
    assert (forward == inner_products(vectors[first], places, vectors[second], places)).all()
    exactly = (vectors[first].astype(np.float64) * vectors[second]).sum(axis=1)
    assert np.abs(forward - exactly).max() <= 2 * np.abs((vectors[first] * vectors[second]).sum(axis=1) - exactly).max()


def test_search_budget_rises_until_the_target_is_reached_or_the_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = clustered_vectors(3000)
    little, much = (run(vectors, "ivf", nprobe=1, target_recall=target) for target in (0.5, 0.999))
    assert little.search_budget < much.search_budget and 0.5 <= little.recall < 0.999 <= much.recall
    assert run(vectors, "ivf", nprobe=1, target_recall=little.recall).search_budget > little.search_budget  # no margin was left
    monkeypatch.setattr(
        IvfSearcher, "search", lambda self, rows, k, budget: (np.zeros((len(rows), k), np.int64), np.zeros((len(rows), k)))
    )
    with pytest.raises(UserError, match=r"pair.backend = ivf: finds 0.0.*target_recall is 0.99; .*lower pair.target_recall"):
        run(vectors, "ivf")


def test_pair_counts_as_found_from_either_side_and_half_if_both_are_sampled() -> None:
    sample = RecallSample(np.array([9, 9, 2]), np.array([4, 7, 7]), np.array([0.9, 0.6, 0.5], np.float32))
    assert sample.rows.tolist() == [2, 4, 7, 9]
    found = np.array([[5, 6], [9, 0], [1, 3], [7, 8]])  # 4 has 9, and 9 has 7; nobody has the third pair
    similarities = np.array([[0.9, 0.8], [0.9, 0.8], [0.8, 0.7], [0.6, 0.5]], np.float32)  # 9 is among the nearest of 4
    share, lower_bound = sample.recall(found, similarities)
    assert share == pytest.approx(1.5 / 2.5)
    error = 2**0.5 * 0.6 / 2.5  # document 9 has 0.6 more than its share, document 2 as much less
    pairs = share * (1 - share) / error**2
    assert share - lower_bound == pytest.approx(2 * (lower_bound * (1 - lower_bound) / pairs) ** 0.5)
    nothing = RecallSample(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    assert nothing.recall(np.zeros((0, 2), np.int64), np.zeros((0, 2), np.float32)) == (1.0, 1.0)


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_recall_of_samples_is_that_of_all_documents(budget: int) -> None:
    """Of many samples the mean share is that of all pairs, and with the margin few are above it."""
    vectors, k, low = clustered_vectors(3000, per_cluster=60, seed=3), 12, 0.4
    ids, scores = ExactSearcher(vectors, threads=1).search(np.arange(3000), k)
    searcher = IvfSearcher(vectors, seed=0, threads=1)
    found, products = searcher.search(np.arange(3000), k, budget)
    inside = scores >= low
    directed = {(a, int(b)) for a in range(3000) for b in ids[a][inside[a]]}
    reached = {(a, int(b)) for a in range(3000) for b in found[a]}
    pairs = {(min(pair), max(pair)) for pair in directed}
    whole = np.mean([pair in reached or pair[::-1] in reached for pair in pairs])
    assert 0.5 < whole < 0.9999 and 1.1 * len(pairs) < len(directed) < 1.9 * len(pairs)  # mutual ones and others
    random, shares, above = np.random.default_rng(0), [], 0
    for _ in range(200):
        first = np.sort(random.permutation(3000)[:300])
        rows = np.repeat(first, inside[first].sum(1))
        sample = RecallSample(rows, ids[first][inside[first]], scores[first][inside[first]])
        share, lower_bound = sample.recall(found[sample.rows], products[sample.rows])
        shares.append(share)
        above += lower_bound > whole
    assert np.mean(shares) == pytest.approx(whole, abs=0.1 * (1 - whole))
    assert above / 200 < 0.2  # without the margin it is half of them


def test_with_no_pair_in_the_band_the_recall_is_one() -> None:
    vectors = unit_vectors(300, 64)
    assert [run(vectors, backend).recall for backend in BACKENDS] == [1.0, 1.0, 1.0]


def test_auto_is_exact_for_few_documents_and_ivf_for_many() -> None:
    assert [choose_backend(PairConfig(), documents) for documents in (100, 6000, 6001)] == ["exact", "exact", "ivf"]
    assert choose_backend(PairConfig(backend="hnsw"), 100) == "hnsw"


class TooNarrow:
    """Stands for a graph that reaches k documents only when `needed` candidates are held."""

    def __init__(self, needed: int) -> None:
        self.needed = needed

    def get_current_count(self) -> int:
        return 64

    def set_ef(self, width: int) -> None:
        self.width = width

    def knn_query(self, queries: np.ndarray, k: int, num_threads: int) -> tuple[np.ndarray, np.ndarray]:
        if self.width < self.needed:
            raise RuntimeError("Cannot return the results in a contiguous 2D array. Probably ef or M is too small")
        return np.tile(np.arange(k, dtype=np.uint64), (len(queries), 1)), np.zeros((len(queries), k))


def test_search_too_narrow_is_widened_and_a_hopeless_one_refused() -> None:
    graph = HnswSearcher(unit_vectors(64, 4), np.arange(64), m=16, ef_construction=100, seed=0, threads=1)
    graph.index._index = TooNarrow(needed=50)
    assert sorted(graph.search(np.array([63]), 8, 10)[0][0]) != []
    assert graph.index._index.width == 64
    graph.index._index = TooNarrow(needed=10_000)
    with pytest.raises(UserError, match=r"fewer than 16 documents.*pair.hnsw_m"):
        graph.search(np.array([63]), 8, 10)


def test_centroids_are_near_their_vectors() -> None:
    vectors = clustered_vectors(2000, per_cluster=100)
    centroids = train_centroids(vectors, 20, seed=0, threads=1)
    assert np.abs(np.linalg.norm(centroids, axis=1) - 1).max() < 1e-5
    nearest = nearest_centroids(vectors, centroids, 3, threads=2)
    scores = vectors @ centroids.T
    assert (nearest == np.argsort(-scores, axis=1)[:, :3]).mean() > 0.999
    within = np.take_along_axis(scores, nearest[:, :1], axis=1).mean()
    assert within > 1.2 * (vectors @ unit_vectors(20, 32).T).max(axis=1).mean()


def test_only_a_crowded_centroid_has_a_price() -> None:
    centroids = unit_vectors(6, 32)
    near = np.repeat([0, 1, 2, 3, 4, 5], [500, 100, 100, 100, 100, 100])
    sample = centroids[near] + 3 * unit_vectors(1000, 32, seed=1)
    sample /= np.linalg.norm(sample, axis=1, keepdims=True)
    prices = balancing_prices(sample, centroids, 1, capacity=300, threads=1)
    assert prices[0] > 0 and (prices[1:] == 0).all()
    sizes = np.bincount(nearest_centroids(sample, centroids, 1, threads=1, prices=prices)[:, 0])
    assert sizes[0] < 330 < np.bincount(nearest_centroids(sample, centroids, 1, threads=1)[:, 0])[0]


@pytest.mark.parametrize("overlap", [2, 3])
@pytest.mark.parametrize("ranked", [8, 1])  # with 1 the nearest partitions are full for some, and all are ranked
def test_partitions_keep_their_capacity_and_find_what_one_self_join_finds(
    overlap: int, ranked: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sbp_fast.neighbors.partition.RANKED", ranked)
    vectors = clustered_vectors(4000, per_cluster=15, seed=1)  # of which one partition would get too many
    stage = as_stage(vectors, tmp_path / "vectors")
    partitions = assign_partitions(stage, 1000, overlap, seed=0, threads=1)
    assert len(partitions) == np.ceil(4000 * overlap / (0.6 * 1000)) and max(map(len, partitions)) <= 1000
    assert (np.bincount(np.concatenate(partitions), minlength=4000) == overlap).all()
    assert all((np.diff(rows) > 0).all() for rows in partitions)  # each at most once
    again = assign_partitions(stage, 1000, overlap, seed=0, threads=2)
    assert all((one == two).all() for one, two in zip(partitions, again, strict=True))
    merged = MergedNeighbors(4000, 20)
    for rows in partitions:
        ids, scores = ExactSearcher(vectors[rows], threads=1).search(np.arange(len(rows)), 20)
        merged.add(rows, rows[ids], scores)
    assert all(len(set(row)) == 20 for row in merged.ids.tolist())
    assert (np.diff(merged.similarities, axis=1) <= 0).all()
    assert pair_recall(merged.ids, vectors) >= 0.99


@pytest.mark.parametrize("ranked", [1, 8])
def test_vectors_whose_nearest_partitions_are_full_go_to_the_next(ranked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbp_fast.neighbors.partition.RANKED", ranked)
    vectors, centroids, room = unit_vectors(600, 16), unit_vectors(12, 16, seed=1), np.full(12, 160)
    chosen = _choose(vectors, centroids, 3, np.zeros(12, np.float32), room, threads=1)
    assert (np.bincount(chosen.reshape(-1), minlength=12) == 160 - room).all() and room.min() == 0 and room.sum() == 120
    assert all(len(set(row)) == 3 for row in chosen.tolist())
    scores = vectors @ centroids.T
    first = np.argsort(-scores, axis=1)[:, :3]
    assert (chosen[:100] == first[:100]).all()  # there was room yet


def test_few_vectors_are_one_partition(tmp_path: Any) -> None:
    partitions = assign_partitions(as_stage(unit_vectors(100, 8), tmp_path / "vectors"), 100, 3, seed=0, threads=1)
    assert [partition.tolist() for partition in partitions] == [list(range(100))]
