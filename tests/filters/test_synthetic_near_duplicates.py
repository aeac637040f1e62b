"""Near-duplicates among synthetic documents, against brute force."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbp_fast.data import holdout as selection
from sbp_fast.dedup.lsh import candidate_pairs
from sbp_fast.filters import tasks
from sbp_fast.filters.near_duplicates import find_duplicates

WIDTH = 6


def runs(tokens: np.ndarray) -> list[tuple[int, ...]]:
    """Return every run of WIDTH tokens."""
    return [tuple(map(int, tokens[start : start + WIDTH])) for start in range(len(tokens) - WIDTH + 1)]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=25), st.integers(0, 2**32))
def test_near_duplicates_equal_brute_force(families: list[int], seed: int) -> None:
    """Documents of one family are far more similar than the limit, documents of two families far less.

    A similarity of 0.96 or more makes two documents candidates but for one time in 1e13.
    """
    random = np.random.default_rng(seed)
    originals = random.integers(0, 1000, (3, 600))
    bodies = []
    for family in families:
        body = originals[family].copy()
        changed = random.integers(3)
        body[[5, 580][:changed]] = random.integers(1000, 9000, changed)  # at most 12 of 595 shingles are others
        bodies.append(np.concatenate([[0], body, [1]]))
    sets = [set(runs(body[1:-1])) for body in bodies]
    stay: list[int] = []
    expected = []
    for i, shingles in enumerate(sets):
        alike = [len(shingles & sets[j]) / len(shingles | sets[j]) for j in stay]
        if max(alike, default=0) >= 0.75:
            expected.append((i, next(one for one in alike if one >= 0.75)))
        else:
            stay.append(i)
    documents, values = duplicates_of(bodies, 0.75)
    assert list(zip(documents, values, strict=True)) == expected


def duplicates_of(bodies: list[np.ndarray], similarity: float) -> tuple[list[int], list[float]]:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as directory:
        files = []
        for part in range(2):
            numbers = [number for number in range(len(bodies)) if number % 2 == part]
            texts = [bodies[number][1:-1] for number in numbers]
            joined = np.concatenate([np.zeros(0, np.uint32), *texts]).astype(np.uint32)
            keys = tasks.token_band_keys(joined, np.cumsum([0, *map(len, texts)]), WIDTH, tasks.BANDS, tasks.ROWS)
            files.append(Path(directory) / str(part))
            with open(files[-1], "wb") as file:
                np.save(file, np.concatenate([np.array([numbers], np.uint64), keys]))
        documents, values = find_duplicates(bodies, files, WIDTH, similarity)  # type: ignore[arg-type]
    return documents.tolist(), values.tolist()


def test_equal_documents_are_found_with_another_between_them() -> None:
    base = np.arange(200)
    bodies = [np.concatenate([[0], base, [1]])] * 3
    bodies.insert(1, np.concatenate([[0], base[:40], [1]]))
    assert duplicates_of(bodies, 0.8) == ([2, 3], [1, 1])


def test_above_a_similarity_of_one_equal_documents_stay() -> None:
    bodies = [np.concatenate([[0], np.arange(200), [1]])] * 3
    assert duplicates_of(bodies, 1.0) == ([1, 2], [1, 1]) and duplicates_of(bodies, 1.01) == ([], [])


def test_candidate_that_is_a_duplicate_is_replaced_by_what_it_duplicates() -> None:
    first, second, third = np.arange(122), np.arange(122), np.arange(122)
    second[50], third[[50, 90]] = 900, (900, 901)
    assert duplicates_of([first, second, third], 0.85) == ([1], [109 / 121])  # the third shares 103 of 127 with the first
    assert duplicates_of([first, second, third], 0.8) == ([1, 2], [109 / 121, 103 / 127])


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12), st.integers(1, 12), st.integers(1, 4)
)
def test_candidate_pairs_are_with_the_first_and_the_previous_document_of_a_bucket(
    keys: list[tuple[int, int]], cut: int, at_once: int
) -> None:
    from tempfile import TemporaryDirectory

    expected = set()
    for band in range(2):
        for key in {row[band] for row in keys}:
            group = [number for number, row in enumerate(keys) if row[band] == key]
            expected |= {(group[0], number) for number in group[1:]} | set(itertools.pairwise(group))
    stored = np.array([[number, *row] for number, row in enumerate(keys)], np.uint64).T
    stored[1:] <<= np.uint64(62)
    with TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "HASHES_IN_MEMORY", at_once)
        files = [Path(directory) / name for name in "ab"]
        for path, part in zip(files, (stored[:, :cut], stored[:, cut:]), strict=True):
            with open(path, "wb") as file:
                np.save(file, part)
        assert [tuple(pair) for pair in candidate_pairs(files).tolist()] == sorted(expected)
