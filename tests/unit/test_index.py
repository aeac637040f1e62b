import numpy as np
import pytest

from sbp_fast.errors import UserError
from sbp_fast.pairs.index import NeighbourIndex, exact_neighbours, similarities


def unit_vectors(documents: int, dimension: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((documents, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def build(vectors: np.ndarray, links: int = 16) -> NeighbourIndex:
    return NeighbourIndex(vectors, links=links, construction=100, seed=0)


@pytest.mark.parametrize("block", [7, 100, 10_000])
def test_exact_neighbours_are_those_of_a_full_sort(block: int) -> None:
    vectors = unit_vectors(300, 12)
    rows, scores = exact_neighbours(vectors[:40], vectors, 25, block=block)
    products = vectors[:40].astype(np.float64) @ vectors.T.astype(np.float64)
    assert rows.tolist() == np.argsort(-products, axis=1)[:, :25].tolist()
    error = np.abs(scores - np.take_along_axis(products, rows, axis=1)).max()
    torch_error = np.abs(vectors[:40] @ vectors.T - products).max()
    assert error <= 2 * torch_error


def test_index_finds_nearly_all_that_the_exact_search_finds() -> None:
    vectors = unit_vectors(5000, 16)
    found = build(vectors).neighbours(10, search=128, threads=1)
    exact = exact_neighbours(vectors, vectors, 11)[0][:, 1:]
    recall = np.mean([np.isin(wanted, got).mean() for wanted, got in zip(exact, found, strict=True)])
    assert recall > 0.995
    nearest_first = np.take_along_axis(vectors @ vectors.T, found, axis=1)
    assert (np.diff(nearest_first, axis=1) <= 1e-6).all()


def test_no_document_is_its_own_neighbour_and_k_may_exceed_the_documents() -> None:
    vectors = np.concatenate([unit_vectors(20, 4), unit_vectors(20, 4)])  # each twice: the copy may hide the document
    found = build(vectors).neighbours(100, search=10, threads=1)
    assert found.shape == (40, 39)
    assert [sorted(row) for row in found.tolist()] == [[i for i in range(40) if i != row] for row in range(40)]


def test_rebuilt_index_gives_the_same_neighbours() -> None:
    vectors = unit_vectors(3000, 16)
    first, second = (build(vectors, links=4).neighbours(20, search=24, threads=threads) for threads in (1, 2))
    assert (first == second).all()


class TooNarrow:
    """Stands for a graph that reaches k documents only when `needed` candidates are held."""

    def __init__(self, needed: int) -> None:
        self.needed = needed

    def set_ef(self, width: int) -> None:
        self.width = width

    def knn_query(self, queries: np.ndarray, k: int, num_threads: int) -> tuple[np.ndarray, np.ndarray]:
        if self.width < self.needed:
            raise RuntimeError("Cannot return the results in a contiguous 2D array. Probably ef or M is too small")
        return np.tile(np.arange(k, dtype=np.uint64), (len(queries), 1)), np.zeros((len(queries), k))


def test_a_search_too_narrow_is_widened_and_a_hopeless_one_explained() -> None:
    index = build(unit_vectors(64, 4))
    index._index = TooNarrow(needed=50)
    assert index.neighbours(8, search=10, threads=1)[63].tolist() == list(range(8))
    assert index._index.width == 80
    index._index = TooNarrow(needed=10_000)
    with pytest.raises(UserError, match=r"fewer than 9 documents.*pair.hnsw_links"):
        index.neighbours(8, search=10, threads=1)


def test_similarity_has_the_same_bits_in_both_directions() -> None:
    vectors = unit_vectors(200, 384)
    first, second = np.random.default_rng(1).integers(200, size=(2, 1000))
    forward = similarities(vectors, first, second, block=64)
    assert (forward == similarities(vectors, second, first, block=999)).all()
    exact = (vectors[first].astype(np.float64) * vectors[second]).sum(axis=1)
    assert np.abs(forward - exact).max() <= 2 * np.abs((vectors[first] * vectors[second]).sum(axis=1) - exact).max()
