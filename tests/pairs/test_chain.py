import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sbp_fast.pairs.chain import related_order


def test_the_path_begins_at_the_fewest_partners_and_follows_the_most_similar() -> None:
    pairs = {0: [1], 1: [2, 0], 2: [1, 3, 4], 3: [2], 4: [2], 5: []}
    seeds = np.repeat(list(pairs), list(map(len, pairs.values())))
    partners = np.array([partner for group in pairs.values() for partner in group])
    order, begins = related_order(6, seeds, partners)
    assert order.tolist() == [5, 0, 1, 2, 3, 4]
    assert begins.tolist() == [True, True, False, False, False, True]


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=80))
def test_every_document_once_and_related_unless_a_path_begins(documents: int, drawn: list[tuple[int, int]]) -> None:
    pairs = sorted({(a, b) for a, b in drawn if a != b and max(a, b) < documents})
    seeds, partners = (np.array([pair[side] for pair in pairs], np.int64) for side in (0, 1))
    order, begins = related_order(documents, seeds, partners)
    assert sorted(order.tolist()) == list(range(documents)) and begins[0]
    for position in np.flatnonzero(~begins).tolist():
        assert (order[position - 1], order[position]) in pairs
    for position in np.flatnonzero(begins[1:]).tolist():  # a path ends only where all partners were visited
        visited = set(order[: position + 1].tolist())
        assert {partner for seed, partner in pairs if seed == order[position]} <= visited
