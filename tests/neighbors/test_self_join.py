"""Every backend against all products, sorted."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from clustered import as_stage, clustered_vectors, unit_vectors

from sbp_fast.config import PairConfig
from sbp_fast.errors import UserError
from sbp_fast.neighbors import exact
from sbp_fast.neighbors.exact import ExactJoin, exact_neighbours
from sbp_fast.neighbors.hnsw import HnswJoin
from sbp_fast.neighbors.ivf import BucketJoin
from sbp_fast.neighbors.kmeans import balancing_prices, nearest_centroids, train_centroids
from sbp_fast.neighbors.partition import Merged, _choose, route
from sbp_fast.neighbors.self_join import Neighbours, Sample, choose_backend, self_join
from sbp_fast.neighbors.top_k import NOBODY, HeapBest, products
from sbp_fast.pipeline.progress import Console

LOW = 0.7  # of the band in these tests
BACKENDS = ("exact", "bucket", "hnswlib")


def brute_force(vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """By float64 products and a full sort."""
    scores = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    np.fill_diagonal(scores, -np.inf)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, : min(k, len(vectors) - 1)]
    return ids, np.take_along_axis(scores, ids, axis=1)


def run(vectors: np.ndarray, backend: Any, threads: int = 1, seed: int = 0, **settings: Any) -> Neighbours:
    def wanted(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return products(vectors, first, vectors, second) >= LOW

    config = PairConfig.model_validate({"neighbours": 20, "recall_queries": 300, "backend": backend, **settings})
    ids, quiet = np.arange(len(vectors)), Console(quiet=True)
    how = {"backend": backend, "wanted": wanted, "seed": seed, "threads": threads, "device": "cpu", "console": quiet}
    return self_join(vectors, ids, config, **how)


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


def test_the_exact_join_is_a_full_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = clustered_vectors(500)
    monkeypatch.setitem(exact.QUERIES, "cpu", 64)
    monkeypatch.setattr(exact, "MEMBERS", 77)
    found = run(vectors, "exact")
    ids, scores = brute_force(vectors, 20)
    assert (found.ids == ids).all() and found.effort == 0
    assert np.abs(found.similarities - scores).max() < 1e-6
    rows = np.array([3, 499, 0])
    blocks = [(np.arange(start, min(start + 90, 500)), vectors[start : start + 90]) for start in range(0, 500, 90)]
    few, products = exact_neighbours(vectors[rows], rows, blocks, 20)
    assert (few == ids[rows]).all() and (products == found.similarities[rows]).all()


def test_probing_every_bucket_is_exact() -> None:
    vectors = clustered_vectors(1500)
    searched = BucketJoin(vectors, seed=0, threads=1)
    ids, scores = searched.search(np.arange(1500), 20, searched.efforts[-1])
    assert (ids == brute_force(vectors, 20)[0]).all()
    rows = np.array([1400, 3, 77])
    few, products = searched.search(rows, 20, searched.efforts[-1])
    assert (few == ids[rows]).all() and (products == scores[rows]).all()


@pytest.mark.parametrize("join", [ExactJoin, partial(BucketJoin, seed=0)])
def test_rounds_on_a_device_find_what_the_heaps_do(join: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the device is the CPU, where the operation of the rounds is plain torch."""
    vectors, rows = clustered_vectors(1500), np.random.default_rng(0).permutation(1500)[:900]
    searched = join(vectors, threads=2)
    efforts = searched.efforts or (0,)
    by_heaps = [searched.search(rows, 20, effort) for effort in efforts]
    monkeypatch.setattr(type(searched), "_on_cpu", type(searched)._on_device)
    monkeypatch.setattr(f"{type(searched).__module__}.QUERIES", {"cpu": 400})
    for effort, heaps in zip(efforts, by_heaps, strict=True):
        rounds = searched.search(rows, 20, effort)
        assert (rounds[0] == heaps[0]).all() and (rounds[1] == heaps[1]).all()
    few = join(vectors[:9], threads=1).search(np.arange(9), 20, 1)[0]
    assert [sorted(row[:8]) for row in few.tolist()] == [[i for i in range(9) if i != row] for row in range(9)]
    assert (few[:, 8:] == NOBODY).all()


@pytest.mark.gpu
def test_a_gpu_finds_what_the_cpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = clustered_vectors(20_000, dimension=384)
    rows = np.random.default_rng(0).permutation(20_000)
    ids, scores = ExactJoin(vectors, threads=2).search(rows, 32)
    for join in (ExactJoin(vectors, threads=2, device="cuda"), BucketJoin(vectors, seed=0, threads=2, device="cuda")):
        found, products = join.search(rows, 32, join.efforts[-1] if join.efforts else 0)
        assert (found == ids).all() and (products == scores).all()
    # a vector between two centroids may have either by rounding, so both devices are given those of the CPU
    monkeypatch.setattr("sbp_fast.neighbors.ivf.nearest_centroids", lambda *a, device, **o: nearest_centroids(*a, **o))
    monkeypatch.setattr("sbp_fast.neighbors.ivf.train_centroids", lambda *a, device, **o: train_centroids(*a, **o))
    joins = [BucketJoin(vectors, seed=0, threads=2, device=device) for device in ("cpu", "cuda")]
    for effort in joins[0].efforts[:3]:
        cpu, cuda = (join.search(rows, 32, effort) for join in joins)
        assert (cpu[0] == cuda[0]).all() and (cpu[1] == cuda[1]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_and_reruns_change_nothing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbp_fast.neighbors.ivf.QUERIES", {"cpu": 500})
    vectors = clustered_vectors(3000)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    one, two, again = (run(vectors, backend, threads=threads) for threads in (1, 2, 1))
    for other in (two, again):
        assert (one.ids == other.ids).all() and (one.similarities == other.similarities).all()
        assert (one.effort, one.recall) == (other.effort, other.recall)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fewer_documents_than_neighbours(backend: str) -> None:
    found = run(unit_vectors(18, 4), backend)
    assert found.ids.shape == (18, 20)
    assert [sorted(row[:17]) for row in found.ids.tolist()] == [[i for i in range(18) if i != row] for row in range(18)]
    assert (found.ids[:, 17:] == NOBODY).all() and np.isneginf(found.similarities[:, 17:]).all()


def test_equal_vectors_are_neighbours_of_each_other_and_no_graph_takes_them() -> None:
    vectors = np.concatenate([unit_vectors(40, 8)] * 2)
    for backend in ("exact", "bucket"):
        found = run(vectors, backend, neighbours=3)
        assert (found.ids[:, 0] == (np.arange(80) + 40) % 80).all()
    with pytest.raises(ValueError, match="collapse copies"):
        run(vectors, "hnswlib")


def test_running_best() -> None:
    generator = np.random.default_rng(0)
    own = np.array([5, 0, 63, NOBODY])
    scores = generator.permutation(4 * 64).reshape(4, 64).astype(np.float32)
    best = HeapBest(own, 7)
    for members in np.array_split(generator.permutation(64), 9):
        for queries in (np.array([3, 0]), np.array([1, 2])):
            shown = torch.from_numpy(scores[np.ix_(queries, members)])
            best.add(shown, torch.from_numpy(queries), torch.from_numpy(members))
    scores[[0, 1, 2], own[:3]] = -1
    assert [sorted(row) for row in best.ids.tolist()] == [sorted(row) for row in np.argsort(-scores, axis=1)[:, :7].tolist()]


def test_products_have_the_same_bits_in_both_directions_and_anywhere() -> None:
    vectors = unit_vectors(200, 384)
    first, second = np.random.default_rng(1).integers(200, size=(2, 1000))
    forward = products(vectors, first, vectors, second)
    assert (forward == products(vectors, second, vectors, first)).all()
    places = np.arange(1000)
    assert (forward == products(vectors[first], places, vectors[second], places)).all()
    exactly = (vectors[first].astype(np.float64) * vectors[second]).sum(axis=1)
    assert np.abs(forward - exactly).max() <= 2 * np.abs((vectors[first] * vectors[second]).sum(axis=1) - exactly).max()


def test_effort_rises_until_the_target_is_reached_or_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = clustered_vectors(3000)
    little, much = (run(vectors, "bucket", bucket_probes=1, target_recall=target) for target in (0.5, 0.999))
    assert little.effort < much.effort and 0.5 <= little.recall < 0.999 <= much.recall
    assert run(vectors, "bucket", bucket_probes=1, target_recall=little.recall).effort > little.effort  # no margin was left
    monkeypatch.setattr(
        BucketJoin, "search", lambda self, rows, k, effort: (np.zeros((len(rows), k), np.int64), np.zeros((len(rows), k)))
    )
    with pytest.raises(UserError, match=r"pair.backend = bucket: finds 0.0.*target_recall is 0.99; .*lower pair.target_recall"):
        run(vectors, "bucket")


def test_a_pair_counts_as_found_from_either_side_and_half_if_it_is_drawn_from_both() -> None:
    sample = Sample(np.array([9, 9, 2]), np.array([4, 7, 7]), np.array([0.9, 0.6, 0.5], np.float32))
    assert sample.rows.tolist() == [2, 4, 7, 9]
    found = np.array([[5, 6], [9, 0], [1, 3], [7, 8]])  # 4 has 9, and 9 has 7; nobody has the third pair
    similarities = np.array([[0.9, 0.8], [0.9, 0.8], [0.8, 0.7], [0.6, 0.5]], np.float32)  # 9 is among the nearest of 4
    share, at_least = sample.recall(found, similarities)
    assert share == pytest.approx(1.5 / 2.5)
    error = 2**0.5 * 0.6 / 2.5  # document 9 has 0.6 more than its share, document 2 as much less
    pairs = share * (1 - share) / error**2
    assert share - at_least == pytest.approx(2 * (at_least * (1 - at_least) / pairs) ** 0.5)
    nothing = Sample(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    assert nothing.recall(np.zeros((0, 2), np.int64), np.zeros((0, 2), np.float32)) == (1.0, 1.0)


@pytest.mark.parametrize("effort", [1, 2, 3])
def test_what_sampled_documents_say_is_true_of_all(effort: int) -> None:
    """Of many samples the mean share is that of all pairs, and with the margin few are above it."""
    vectors, k, low = clustered_vectors(3000, per_cluster=60, seed=3), 12, 0.4
    ids, scores = ExactJoin(vectors, threads=1).search(np.arange(3000), k)
    join = BucketJoin(vectors, seed=0, threads=1)
    found, products = join.search(np.arange(3000), k, effort)
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
        sample = Sample(rows, ids[first][inside[first]], scores[first][inside[first]])
        share, at_least = sample.recall(found[sample.rows], products[sample.rows])
        shares.append(share)
        above += at_least > whole
    assert np.mean(shares) == pytest.approx(whole, abs=0.1 * (1 - whole))
    assert above / 200 < 0.2  # without the margin it is half of them


def test_with_nothing_in_the_band_the_least_effort_will_do() -> None:
    vectors = unit_vectors(300, 64)
    assert [run(vectors, backend).recall for backend in BACKENDS] == [1.0, 1.0, 1.0]


def test_auto_is_exact_for_few_and_buckets_for_many() -> None:
    assert [choose_backend(PairConfig(), documents) for documents in (100, 6000, 6001)] == ["exact", "exact", "bucket"]
    assert choose_backend(PairConfig(backend="hnswlib"), 100) == "hnswlib"


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


def test_a_search_too_narrow_is_widened_and_a_hopeless_one_explained() -> None:
    graph = HnswJoin(unit_vectors(64, 4), np.arange(64), links=16, construction=100, seed=0, threads=1)
    graph.index._index = TooNarrow(needed=50)
    assert sorted(graph.search(np.array([63]), 8, 10)[0][0]) != []
    assert graph.index._index.width == 64
    graph.index._index = TooNarrow(needed=10_000)
    with pytest.raises(UserError, match=r"fewer than 16 documents.*pair.hnsw_links"):
        graph.search(np.array([63]), 8, 10)


def test_centroids_gather_what_is_near() -> None:
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
    prices = balancing_prices(sample, centroids, 1, most=300, threads=1)
    assert prices[0] > 0 and (prices[1:] == 0).all()
    sizes = np.bincount(nearest_centroids(sample, centroids, 1, threads=1, prices=prices)[:, 0])
    assert sizes[0] < 330 < np.bincount(nearest_centroids(sample, centroids, 1, threads=1)[:, 0])[0]


@pytest.mark.parametrize("overlap", [2, 3])
@pytest.mark.parametrize("ranked", [8, 1])  # with 1 the nearest cells are full for some, and all are looked at
def test_routed_cells_hold_no_more_than_they_may_and_find_what_one_join_finds(
    overlap: int, ranked: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sbp_fast.neighbors.partition.RANKED", ranked)
    vectors = clustered_vectors(4000, per_cluster=15, seed=1)  # of which one cell would get too many
    stage = as_stage(vectors, tmp_path / "vectors")
    cells = route(stage, 1000, overlap, seed=0, threads=1)
    assert len(cells) == np.ceil(4000 * overlap / (0.6 * 1000)) and max(map(len, cells)) <= 1000
    assert (np.bincount(np.concatenate(cells), minlength=4000) == overlap).all()
    assert all((np.diff(rows) > 0).all() for rows in cells)  # each at most once
    again = route(stage, 1000, overlap, seed=0, threads=2)
    assert all((one == two).all() for one, two in zip(cells, again, strict=True))
    merged = Merged(4000, 20)
    for rows in cells:
        ids, scores = ExactJoin(vectors[rows], threads=1).search(np.arange(len(rows)), 20)
        merged.add(rows, rows[ids], scores)
    assert all(len(set(row)) == 20 for row in merged.ids.tolist())
    assert (np.diff(merged.similarities, axis=1) <= 0).all()
    assert pair_recall(merged.ids, vectors) >= 0.99


@pytest.mark.parametrize("ranked", [1, 8])
def test_who_finds_the_nearest_cells_full_goes_to_the_next(ranked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbp_fast.neighbors.partition.RANKED", ranked)
    vectors, centroids, room = unit_vectors(600, 16), unit_vectors(12, 16, seed=1), np.full(12, 160)
    chosen = _choose(vectors, centroids, 3, np.zeros(12, np.float32), room, threads=1)
    assert (np.bincount(chosen.reshape(-1), minlength=12) == 160 - room).all() and room.min() == 0 and room.sum() == 120
    assert all(len(set(row)) == 3 for row in chosen.tolist())
    scores = vectors @ centroids.T
    first = np.argsort(-scores, axis=1)[:, :3]
    assert (chosen[:100] == first[:100]).all()  # there was room yet


def test_few_enough_vectors_are_one_cell(tmp_path: Any) -> None:
    cells = route(as_stage(unit_vectors(100, 8), tmp_path / "vectors"), 100, 3, seed=0, threads=1)
    assert [cell.tolist() for cell in cells] == [list(range(100))]
