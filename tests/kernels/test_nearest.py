"""`nearest_in_buckets` by every backend against all products in float64; the Triton kernel in Triton's interpreter."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sbp_kernels.nearest import api as nearest
from sbp_kernels.nearest import nearest_in_buckets
from sbp_kernels.nearest import triton as nearest_kernels
from torch import Tensor
from trees import error

BACKENDS = ["torch", "triton"]
BLOCK_OPTIONS = nearest_kernels.block_options
EMPTY = torch.empty


@pytest.fixture(autouse=True)
def small_blocks_and_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that the interpreter is quick at, and in its memory what would be found if it were taken for a result."""

    def small(neighbours: int, dtype: torch.dtype) -> dict[str, Any]:
        options = BLOCK_OPTIONS(neighbours, dtype)
        sizes = {"BLOCK_Q": 4, "BLOCK_M": 8, "BLOCK_D": 8, "ROOM": max(8, options["KEPT"]), "ROWS": 2}
        return {**options, **sizes}

    def poisoned(*shape: Any, **options: Any) -> Tensor:
        x = EMPTY(*shape, **options)
        return x if x.dtype.is_floating_point else x.fill_(torch.iinfo(x.dtype).max)

    monkeypatch.setattr(nearest, "PLAIN_MEMBERS", 8)
    monkeypatch.setattr(nearest_kernels, "block_options", small)
    monkeypatch.setattr(nearest_kernels.torch, "empty", poisoned)


class Search:
    """Queries among members in buckets, what is found, and the definition of it."""

    def __init__(self, queries: Tensor, members: Tensor, own: list[int], sizes: list[int], k: int) -> None:
        self.queries, self.members, self.own = queries, members, torch.tensor(own, dtype=torch.int64)
        self.starts = torch.tensor([0, *np.cumsum(sizes)])
        self.scores = torch.full((len(own), k), -torch.inf)
        self.indices = torch.full((len(own), k), -1)
        self.exact = queries.double().cpu() @ members.double().cpu().T
        self.shown = torch.zeros_like(self.exact, dtype=torch.bool)

    def show(self, buckets: Tensor, backend: str) -> None:
        tensors = (self.scores, self.indices, self.queries, self.own, buckets, self.members, self.starts)
        nearest_in_buckets(*tensors, backend=backend)
        place = torch.arange(len(self.members))
        inside = (place >= self.starts[buckets, None]) & (place < self.starts[buckets + 1, None])
        self.shown |= inside & (place != self.own[:, None])

    def best(self) -> tuple[Tensor, Tensor]:
        """Scores float64 and indices, by a full sort of what was shown."""
        k = self.scores.shape[1]
        padded = torch.nn.functional.pad(self.exact.where(self.shown, -torch.inf), (0, k), value=-torch.inf)
        scores, indices = padded.sort(dim=1, descending=True, stable=True)
        return scores[:, :k], indices[:, :k].masked_fill(scores[:, :k].isneginf(), -1)

    def check(self) -> None:
        scores, indices = self.best()
        assert torch.equal(self.indices, indices)
        assert torch.equal(self.scores.double(), scores)


def whole_numbers(rows: int, width: int, seed: int) -> Tensor:
    """Vectors whose products are exact in every order and type, with many ties."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-2, 3, (rows, width)).astype(np.float32))


@settings(max_examples=25)
@given(
    st.sampled_from(BACKENDS),
    st.sampled_from([torch.float32, torch.float16]),
    st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any),
    st.integers(1, 11),
    st.integers(1, 11),
    st.integers(1, 18),
    st.integers(0, 2**32),
)
def test_every_round_keeps_the_best_of_all_that_was_shown(
    backend: str, dtype: torch.dtype, sizes: list[int], count: int, k: int, width: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    own = random.integers(-1, sum(sizes), count).tolist()
    queries, members = (whole_numbers(rows, width, seed + n).to(dtype) for n, rows in enumerate((count, sum(sizes))))
    search = Search(queries, members, own, sizes, k)
    rounds = random.permuted(np.tile(np.arange(len(sizes)), (count, 1)), axis=1).T
    for buckets in rounds[:3]:
        search.show(torch.from_numpy(buckets.copy()), backend)
        search.check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_members_find_each_other_round_by_round_as_in_one_bucket(backend: str) -> None:
    """Tiles of several queries and members of one bucket, an empty bucket, and queries in an order of their own."""
    members = whole_numbers(30, 5, 1)
    order = torch.from_numpy(np.random.default_rng(0).permutation(30))[:20]
    searches = [Search(members[order], members, order.tolist(), sizes, 7) for sizes in ([11, 0, 19], [30])]
    for shift in range(3):
        searches[0].show((torch.arange(20) + shift) % 3, backend)
    searches[1].show(torch.zeros(20, dtype=torch.int64), backend)
    for search in searches:
        search.check()
        assert not (search.indices == order[:, None]).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equal_scores_the_lower_indices_stay(backend: str) -> None:
    search = Search(torch.tensor([[1.0, -1.0], [-1.0, 1.0], [-1.0, 0.0]]), torch.ones(40, 2), [-1, -1, 3], [10, 30], 6)
    search.show(torch.tensor([1, 0, 0]), backend)
    search.check()
    search.scores[search.scores == 0] = -0.0  # zeros of either sign are equal
    search.show(torch.tensor([0, 1, 1]), backend)
    search.check()
    assert search.indices.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1, 2, 4, 5, 6]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products_err_at_most_twice_as_much_as_a_matrix_product(backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, members = (torch.randn(rows, 70, generator=generator).to(dtype) for rows in (6, 50))
    search = Search(queries, members, [-1] * 6, [50], 12)
    search.show(torch.zeros(6, dtype=torch.int64), backend)
    assert torch.equal(search.indices, search.best()[1])
    exact, plain = search.best()[0], (queries @ members.T).gather(1, search.indices)
    assert error(search.scores, exact) <= 2 * error(plain, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_else_is_read_or_written(backend: str) -> None:
    """Rows of other buckets, columns beside the tensors, and lists of others."""

    def beside(x: Tensor, poison: float) -> Tensor:
        wide = torch.full((2 * len(x), x.shape[1] + 3), poison, dtype=x.dtype)
        wide[::2, 1:-2] = x
        return wide[::2, 1:-2]

    members = whole_numbers(30, 7, 3)
    search = Search(members[[3, 8, 12]], members.clone(), [3, 8, 12], [10, 9, 11], 4)
    search.members[:10] = search.members[19:] = torch.nan
    search.members, search.queries = beside(search.members, torch.nan), beside(search.queries, torch.nan)
    search.scores, search.indices = beside(search.scores, torch.nan), beside(search.indices, 77)
    search.own = torch.stack([search.own, torch.full_like(search.own, 5)], 1)[:, 0]
    search.show(torch.tensor([1, 1, 1]), backend)
    search.check()
    assert search.scores._base is not None and search.indices._base is not None
    assert search.scores._base.isnan().sum() == 6 * 7 - 3 * 4
    assert (search.indices._base == 77).sum() == 6 * 7 - 3 * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_queries_and_empty_buckets_change_nothing(backend: str) -> None:
    search = Search(torch.zeros(0, 5), torch.zeros(3, 5), [], [3], 2)
    search.show(torch.zeros(0, dtype=torch.int64), backend)
    search = Search(torch.zeros(2, 5), torch.zeros(3, 5), [-1, 0], [0, 3, 0], 2)
    search.show(torch.tensor([0, 2]), backend)
    assert (search.indices == -1).all() and search.scores.isneginf().all()
    search.show(torch.tensor([1, 1]), backend)
    search.check()


def test_the_same_bits_at_every_run() -> None:
    generator = torch.Generator().manual_seed(5)
    members, order = torch.randn(40, 9, generator=generator), torch.tensor([4, 0, 2, 5])
    found = []
    for rows in (torch.arange(6), torch.arange(6), order):
        search = Search(members[rows], members, rows.tolist(), [25, 15], 5)
        for shift in range(2):
            search.show((rows + shift) % 2, "triton")
        found.append((search.scores, search.indices))
    assert all(map(torch.equal, found[0], found[1]))
    assert torch.equal(found[0][1][order], found[2][1])  # a list depends on no other query


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 9))
def test_tiles_hold_every_query_once_beside_others_of_its_bucket(buckets: list[int], rows: int) -> None:
    starts = torch.tensor([0, 3, 3, 10, 11, 30, 31])
    order, tiles = nearest_kernels.tiles_of(torch.tensor(buckets), starts, rows)
    used = tiles[tiles[:, 1] > tiles[:, 0]].tolist()
    indices = [place for start, stop, _, _ in used for place in range(start, stop)]
    assert sorted(order[indices].tolist()) == list(range(len(buckets)))
    assert len(used) == sum(-(-buckets.count(bucket) // rows) for bucket in set(buckets))
    for start, stop, first, last in used:
        (bucket,) = {buckets[query] for query in order[start:stop].tolist()}
        assert stop - start <= rows and [first, last] == starts[bucket : bucket + 2].tolist()
    empty = tiles[tiles[:, 1] == tiles[:, 0]]
    assert torch.equal(empty[:, 2], empty[:, 3])


def test_opcheck_of_the_declared_mutations() -> None:
    search = Search(torch.randn(3, 4), torch.randn(9, 4), [0, 1, -1], [4, 5], 3)
    arguments = (search.scores, search.indices, search.queries, search.own, torch.tensor([0, 1, 1]))
    torch.library.opcheck(torch.ops.sbp_kernels.nearest_in_buckets, (*arguments, search.members, search.starts))


def test_block_sizes_fit_each_other() -> None:
    for neighbours in (1, 2, 40, 64, 65, 1024):
        for dtype in nearest.DTYPES:
            options = BLOCK_OPTIONS(neighbours, dtype)
            assert neighbours <= options["KEPT"] <= options["ROOM"] and options["BLOCK_M"] <= options["ROOM"]


def test_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    search = Search(torch.zeros(2, 4), torch.zeros(5, 4), [0, 1], [5], 3)
    right = {
        "scores": search.scores,
        "indices": search.indices,
        "queries": search.queries,
        "own_index": search.own,
        "buckets": torch.zeros(2, dtype=torch.int64),
        "members": search.members,
        "starts": search.starts,
    }
    for wrong, message in [
        ({"queries": torch.zeros(2, 3)}, r"queries and members must be \[Q, D\], \[N, D\]"),
        ({"queries": torch.zeros(2, 4).half()}, "must both be float32, bfloat16 or float16"),
        ({"queries": torch.zeros(2, 4).long(), "members": torch.zeros(5, 4).long()}, "must both be float32"),
        ({"scores": torch.zeros(2, 0)}, r"scores must be \[Q, K\] with K at least 1"),
        ({"scores": torch.zeros(3, 3)}, r"scores must be torch.float32 \[2, 3\]"),
        ({"indices": torch.zeros(2, 3)}, r"indices must be torch.int64 \[2, 3\]"),
        ({"own_index": torch.zeros(3, dtype=torch.int64)}, r"own_index must be torch.int64 \[2\]"),
        ({"buckets": torch.zeros(2, dtype=torch.int32)}, r"buckets must be torch.int64 \[2\]"),
        ({"members": torch.zeros(5, 4, device="meta")}, "members must be .* on cpu"),
        ({"starts": torch.zeros(1, dtype=torch.int64)}, r"starts must be \[B \+ 1\] with B at least 1"),
        ({"starts": torch.zeros(2)}, "starts must be torch.int64"),
        ({"scores": torch.zeros(3, 2).T}, "must be side by side in memory"),
        ({"backend": "cuda"}, "backend 'cuda' is unknown: use one of auto, triton, torch"),
    ]:
        with pytest.raises(ValueError, match=message):
            nearest_in_buckets(**{**right, **wrong})
    many = {"scores": torch.zeros(2, 1025), "indices": torch.zeros(2, 1025, dtype=torch.int64)}
    with pytest.raises(ValueError, match="'triton' keeps up to 1024 neighbours, not 1025"):
        nearest_in_buckets(**{**right, **many}, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="'triton' needs CUDA tensors"):
        nearest_in_buckets(**right, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 40, 200])
def test_on_a_gpu(dtype: torch.dtype, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    generator = torch.Generator().manual_seed(0)
    members = torch.nn.functional.normalize(torch.randn(5000, 384, generator=generator), dim=1).to("cuda", dtype)
    starts = torch.tensor([0, 700, 700, 1500, 5000], device="cuda")
    own = torch.randperm(5000, generator=generator)[:3000].cuda()
    indices = torch.arange(5000, device="cuda")
    exact = members[own].double() @ members.double().T
    exact.masked_fill_(indices == own[:, None], -torch.inf)

    def search() -> tuple[Tensor, Tensor]:
        scores = torch.full((3000, k), -torch.inf, device="cuda")
        found = torch.full((3000, k), -1, device="cuda")
        for shift in range(4):
            buckets = (torch.arange(3000, device="cuda") + shift) % 4
            nearest_in_buckets(scores, found, members[own], own, buckets, members, starts)
        return scores, found

    scores, found = search()
    assert all(map(torch.equal, search(), (scores, found)))
    assert not (found == own[:, None]).any() and (scores.diff(dim=1) <= 0).all()
    right = exact.gather(1, found)
    plain = (members[own] @ members.T).gather(1, found)
    assert error(scores, right) <= 2 * error(plain, right)
    assert error(right, exact.topk(k, 1).values) <= error(plain, right)  # none is missed but by rounding
