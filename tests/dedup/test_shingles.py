import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbp_fast.dedup.shingles import DocumentShingles, ShingleTable, repeated_share, shingle_hashes

TEXTS = st.lists(st.integers(0, 3), max_size=24)


def shingles(tokens: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def shingle_set(tokens: list[int], n: int) -> set[tuple[int, ...]]:
    return set(shingles(tokens, n)) if len(tokens) >= n else {tuple(tokens)}


@settings(deadline=None, max_examples=150)
@given(texts=st.lists(TEXTS, min_size=1, max_size=8), n=st.integers(1, 6))
def test_containment_is_that_of_the_sets(texts: list[list[int]], n: int) -> None:
    texts.append(list(texts[0]))
    table = ShingleTable.build([np.array(tokens, np.uint16) for tokens in texts], n)
    first, second = (index.ravel() for index in np.meshgrid(np.arange(len(texts)), np.arange(len(texts))))
    of_first, of_second = table.containment(first, second)
    for pair, (a, b) in enumerate(zip(first, second, strict=True)):
        left, right = shingle_set(texts[a], n), shingle_set(texts[b], n)
        assert of_first[pair] == len(left & right) / len(left)
        assert of_second[pair] == len(left & right) / len(right)


@settings(deadline=None, max_examples=150)
@given(tokens=TEXTS, n=st.integers(1, 6))
def test_hashes_are_sorted_unique_and_one_a_shingle(tokens: list[int], n: int) -> None:
    hashes = shingle_hashes(tokens, n)
    assert hashes.dtype == np.uint64 and (np.diff(hashes.astype(object)) > 0).all()
    assert len(hashes) == len(set(shingles(tokens, n)))


@settings(deadline=None, max_examples=150)
@given(tokens=TEXTS, n=st.integers(1, 6))
def test_repeated_share_counts_positions(tokens: list[int], n: int) -> None:
    all_shingles = shingles(tokens, n)
    repeated = sum(all_shingles.count(shingle) > 1 for shingle in all_shingles)
    assert repeated_share(tokens, n) == (repeated / len(all_shingles) if all_shingles else 0.0)


def test_large_ids_and_other_orders_give_other_shingles() -> None:
    """Ids beyond 16 bits, and shingles of the same tokens in another order, are other shingles."""
    assert len(shingle_hashes([1, 2, 2, 1, 70_001, 2, 1, 65_537, 1, 1], 2)) == 8


def test_a_short_text_is_contained_in_its_equals_alone() -> None:
    table = ShingleTable.build([np.array(tokens) for tokens in ([5, 6], [5, 6], [4, 5, 6, 7], [5], [])], 3)
    assert table.containment([0, 0, 0, 3, 4, 4], [1, 2, 3, 0, 4, 0])[0].tolist() == [1, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("held", [6, 100])
def test_containment_in_parts_equals_containment_at_once(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbp_fast.dedup.shingles.DOCUMENTS_IN_MEMORY", held)
    random = np.random.default_rng(0)
    texts = [random.integers(0, 6, random.integers(1, 60)).astype(np.uint16) for _ in range(40)]
    table, shingles = ShingleTable.build(texts, 3), DocumentShingles(40, texts.__getitem__, 3)
    first, second = random.integers(40, size=(2, 200))
    assert np.array_equal(table.containment(first, second), shingles.containment(first, second))
    few = random.permutation(40)[:20]
    asked = random.integers(20, size=(2, 50))
    assert np.array_equal(shingles.select(few).containment(*asked), table.containment(*few[asked]))
    assert np.concatenate([part.hashes for part in shingles.tables()]).tolist() == table.hashes.tolist()


def test_signatures_agree_with_the_probability_of_the_jaccard_similarity() -> None:
    random = np.random.default_rng(0)
    texts = [random.integers(0, 10_000, 400) for _ in range(60)]
    cuts = range(400, 100, -5)
    changed = [
        np.concatenate([text[:cut], random.integers(0, 10_000, 400 - cut)]) for text, cut in zip(texts, cuts, strict=True)
    ]
    table = ShingleTable.build([*texts, *changed], 2)
    signatures = table.signatures(128)
    agreeing = (signatures[:60] == signatures[60:]).mean(axis=1)
    for place in range(60):
        mine, theirs = (set(table.hashes[table.offsets[row] : table.offsets[row + 1]].tolist()) for row in (place, place + 60))
        jaccard = len(mine & theirs) / len(mine | theirs)
        assert agreeing[place] == pytest.approx(jaccard, abs=5 * (0.25 / 128) ** 0.5)
    few = [text[:12] for text in texts]  # most slots are empty
    sparse = ShingleTable.build([*few, *[np.append(text[:6], random.integers(0, 10_000, 6)) for text in few]], 2).signatures(
        128
    )
    assert (sparse[:60] == sparse[60:]).mean() == pytest.approx(5 / 17, abs=0.05)
    short = ShingleTable.build([np.array([1, 2, 3]), np.array([1, 2, 3]), np.array([1, 2, 4])], 2).signatures(64)
    assert (short[0] == short[1]).all() and 0 < (short[0] == short[2]).mean() < 1
