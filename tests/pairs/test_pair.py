import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from paired_documents import (
    DOCUMENTS,
    UNCAPPED,
    as_set,
    make_documents,
    make_vectors,
    qualifying,
    representatives,
    run_pair,
    write_inputs,
)

from sbp_fast.config import PairConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.dedup.clusters import first_of_near_duplicates
from sbp_fast.dedup.shingles import DocumentShingles
from sbp_fast.errors import UserError
from sbp_fast.neighbors.exact import ExactSearcher
from sbp_fast.neighbors.vectors import Vectors
from sbp_fast.pairs.criteria import random_pairs
from sbp_fast.pairs.document_statistics import DistinctDocuments
from sbp_fast.pipeline.files import read_json


@pytest.mark.parametrize("backend", ["exact", "ivf", "hnsw"])
@pytest.mark.parametrize("seed", range(4))
def test_without_caps_the_pairs_are_all_that_qualify(tmp_path: Path, seed: int, backend: str) -> None:
    texts, ids = make_documents(seed)
    vectors = make_vectors(seed)
    write_inputs(tmp_path, texts, ids, vectors)
    band = {"similarity_low": 0.2, "similarity_high": 0.9, "near_duplicate_containment": 0.3}
    pairs, counts = run_pair(tmp_path, backend=backend, target_recall=1.0, **band, **UNCAPPED)
    expected = qualifying(texts, ids, vectors, 0.2, 0.9, 0.3)
    assert as_set(pairs) == expected and len(pairs) == len(expected) > 200
    assert np.abs(pairs.scores - (vectors[pairs.seeds] * vectors[pairs.partners]).sum(axis=1)).max() < 1e-6
    assert counts["seeds"] == len({a for a, _ in expected})
    dropped = counts["dropped"]
    near = DOCUMENTS - 2 - len(representatives(texts))
    assert near >= 2 and counts["duplicates"] == {"exact_duplicates": 2, "near_duplicates": near, "same_vector_duplicates": 0}
    assert min(dropped[reason] for reason in ("below_band", "above_band", "same_group", "near_duplicates")) > 0
    every_pair = len(representatives(texts)) * (len(representatives(texts)) - 1)
    if backend == "exact":
        assert counts["candidates"] == every_pair == len(expected) + sum(dropped.values())
    assert counts["recall"]["recall"] == 1.0 and counts["self_join"]["backend"] == backend
    assert sum(counts["containment"]["pairs"][:6]) == len(expected) and sum(counts["containment"]["pairs"][6:]) == 0


def test_exclude_same_group_false_accepts_pairs_of_one_original(tmp_path: Path) -> None:
    texts, ids = make_documents(0)
    write_inputs(tmp_path, texts, ids, make_vectors(0))
    band = {"similarity_low": 0.2, "near_duplicate_containment": 0.3}
    pairs, _ = run_pair(tmp_path, exclude_same_group=False, **band, **UNCAPPED)
    ungrouped = [str(number) for number in range(DOCUMENTS)]
    assert as_set(pairs) == qualifying(texts, ungrouped, make_vectors(0), 0.2, 1.0, 0.3)


def test_caps_hold_and_drop_nothing_for_which_there_is_room(tmp_path: Path) -> None:
    texts, ids = make_documents(5)
    write_inputs(tmp_path, texts, ids, make_vectors(5))
    everything, _ = run_pair(tmp_path, "all", similarity_low=0.2, **UNCAPPED)
    capped = {"similarity_low": 0.2, "neighbors": DOCUMENTS, "partners_per_seed": 4, "seeds_per_partner": 3}
    pairs, counts = run_pair(tmp_path, "capped", **capped)
    partners_of, seeds_of = Counter(pairs.seeds.tolist()), Counter(pairs.partners.tolist())
    assert max(partners_of.values()) <= 4 and max(seeds_of.values()) == 3
    left_out = as_set(everything) - as_set(pairs)
    assert as_set(pairs) < as_set(everything) and len(left_out) == sum(
        counts["dropped"][cap] for cap in ("seed_cap", "partner_cap")
    )
    assert all(partners_of[seed] == 4 or seeds_of[partner] == 3 for seed, partner in left_out)


def test_automatic_low_end_is_exceeded_by_the_given_share_of_random_pairs(tmp_path: Path) -> None:
    texts, ids = make_documents(1)
    vectors = make_vectors(1)
    write_inputs(tmp_path, texts, ids, vectors)
    _, counts = run_pair(tmp_path, random_pair_rate=0.05)
    rows = representatives(texts)
    differ = [vectors[a] @ vectors[b] for a in rows for b in rows if a // 3 != b // 3]
    assert counts["band"]["low_origin"] == "auto"
    assert counts["random_pair_rate"] == pytest.approx(0.05, abs=1e-3)
    assert np.mean(np.array(differ) >= counts["band"]["low"]) == pytest.approx(0.05, abs=3e-3)


def test_recall_is_measured_against_the_exact_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, ids = make_documents(2)
    vectors = make_vectors(2)
    write_inputs(tmp_path, texts, ids, vectors)
    rows = representatives(texts)
    count = len(rows)
    poor = np.random.default_rng(0).permuted(np.tile(np.arange(count), (count, 1)), axis=1)
    poor = np.stack([row[row != number][:10] for number, row in enumerate(poor)])
    products = vectors[rows] @ vectors[rows].T
    poor[::4] = np.argsort(-products, axis=1)[::4, 1:11]  # a quarter of them are searched well
    scores = np.einsum("nd,nkd->nk", vectors[rows], vectors[rows][poor])

    search_exactly = ExactSearcher.search

    def search(self: ExactSearcher, rows: np.ndarray, k: int, *_: object) -> tuple[np.ndarray, np.ndarray]:
        if len(self.vectors) != count:  # of held-out documents
            return search_exactly(self, rows, k)
        return poor[rows], scores[rows]

    monkeypatch.setattr(ExactSearcher, "search", search)
    band = {"similarity_low": 0.2, "neighbors": 10, "near_duplicate_containment": 0.3}
    _, counts = run_pair(tmp_path, target_recall=0.1, **band)
    allowed = qualifying(texts, ids, vectors, 0.2, 1.0, 0.3)
    candidates = {(rows[a], rows[b]) for a, others in enumerate(poor) for b in others}
    candidates |= {(b, a) for a, b in candidates}
    nearest = {(rows[a], rows[b]) for a in range(count) for b in np.argsort(-products[a])[1:11]}
    assert counts["recall"]["pairs"] == len(nearest & allowed)
    assert counts["recall"]["found"] == len(nearest & allowed & candidates)
    weights = {}  # a pair that would be drawn from its other document, too, counts half
    for a in range(count):
        for b in np.argsort(-products[a])[1:11]:
            weights[rows[a], rows[b]] = 0.5 if products[a, b] >= scores[b].min() else 1.0
    found, all_pairs = (sum(weights[pair] for pair in pairs) for pairs in (nearest & allowed & candidates, nearest & allowed))
    assert counts["recall"]["recall"] == pytest.approx(found / all_pairs) and 0.1 < found / all_pairs < 0.8
    assert set(weights.values()) == {0.5, 1.0}
    with pytest.raises(
        UserError, match=r"of the pairs in the band were found, by \d+ .*target_recall is 0.9; lower pair.target_recall"
    ):
        run_pair(tmp_path, "refused", target_recall=0.9, **band)
    run_pair(tmp_path, "refused", target_recall=0.1, **band)  # nothing is left of the refused one to stand in the way


def test_duplicates_are_replaced_by_the_first_and_listed(tmp_path: Path) -> None:
    texts, ids = make_documents(3)
    vectors = make_vectors(3)
    vectors[55] = vectors[11]  # another text, of which the encoder saw the same head
    write_inputs(tmp_path, texts, ids, vectors)
    pairs, counts = run_pair(tmp_path, similarity_low=-1.0, near_duplicate_containment=1.0, **UNCAPPED)
    table = pq.read_table(tmp_path / "pairs/duplicates.parquet").to_pydict()
    into = dict(zip(table["document"], zip(table["representative"], table["kind"], strict=True), strict=True))
    seven = into.get(7, (7, ""))[0]
    planted = {30: (seven, "exact"), 41: (seven, "exact"), 50: (24, "near"), 57: (24, "near"), 55: (11, "same vector")}
    assert planted.items() <= into.items()
    assert set(into) == set(range(DOCUMENTS)) - set(representatives(texts)) | {55}
    assert {kind: list(table["kind"]).count(kind) for kind in ("exact", "near", "same vector")} == {
        kind.removesuffix("_duplicates").replace("_", " "): count for kind, count in counts["duplicates"].items()
    }
    assert not set(into) & set(pairs.seeds.tolist())


@pytest.mark.parametrize("held", [300, 65_536])
def test_near_duplicates_are_found_at_any_place_and_number(held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    originals = [random.integers(0, 5000, 200) for _ in range(50)]
    texts = [*originals]
    for number, original in enumerate(originals):
        for _ in range(40):
            copy = original.copy()
            copy[random.integers(200)] = 5001 + number  # spoils 13 of 188 shingles
            texts.append(copy)
        half = original.copy()
        half[100:] = random.integers(0, 5000, 100)
        texts.append(half)
    monkeypatch.setattr("sbp_fast.dedup.shingles.DOCUMENTS_IN_MEMORY", held)
    first = first_of_near_duplicates(DocumentShingles(len(texts), texts.__getitem__, 13), 0.8, tmp_path)
    copies = np.array([50 + 41 * number + place for number in range(50) for place in range(40)])
    assert (first[copies] == np.repeat(np.arange(50), 40)).mean() > 0.999
    others = np.setdiff1d(np.arange(len(texts)), copies)
    assert (first[others] == others).all()


def test_documents_are_the_same_in_another_process(tmp_path: Path) -> None:
    write_inputs(tmp_path, *make_documents(0), make_vectors(0))
    settings = PairConfig(shingle_tokens=4)
    here = DistinctDocuments.load(PreparedCorpus(tmp_path / "corpus"), Vectors(tmp_path / "vectors"), settings, tmp_path)
    there = pickle.loads(pickle.dumps(here))
    assert len(here) < DOCUMENTS - 3 and np.array_equal(there.rows, here.rows) and np.array_equal(there.groups, here.groups)
    assert np.array_equal(there.vectors[np.arange(len(here))], here.vectors[np.arange(len(here))])
    first, second = np.triu_indices(len(here), 1)
    shares = [documents.shingles.containment(first, second) for documents in (here, there)]
    assert np.array_equal(*shares) and np.max(shares) > 0.5


def test_examples_show_every_bin_of_similarity(tmp_path: Path) -> None:
    texts, ids = make_documents(3)
    write_inputs(tmp_path, texts, ids, make_vectors(3))
    pairs, counts = run_pair(tmp_path, similarity_low=0.2, near_duplicate_containment=0.3, **UNCAPPED)
    bins = read_json(tmp_path / "pairs/examples.json")
    assert sum(bin["candidates"] for bin in bins) * 2 == counts["candidates"]
    assert sum(bin["accepted"] for bin in bins) * 2 == len(pairs)
    rows, reasons = {id: row for row, id in enumerate(ids)}, set()
    for bin in bins:
        assert len(bin["examples"]) == min(3, bin["candidates"])
        for example in bin["examples"]:
            pair = rows[example["first"]["id"]], rows[example["second"]["id"]]
            assert bin["low"] <= example["similarity"] <= bin["high"] or bin["low"] == 0
            assert (example["reject_reason"] is None) == (pair in as_set(pairs))
            reasons.add(example["reject_reason"])
    assert {None, "below_band"} <= reasons


def test_output_is_ordered_and_the_same_each_time(tmp_path: Path) -> None:
    write_inputs(tmp_path, *make_documents(3), make_vectors(3))
    first, second = (run_pair(tmp_path, name, similarity_low=0.2)[0] for name in ("one", "two"))
    assert (tmp_path / "one/pairs.parquet").read_bytes() == (tmp_path / "two/pairs.parquet").read_bytes()
    assert first.fingerprint == second.fingerprint
    rows = list(zip(first.seeds.tolist(), (-first.scores).tolist(), first.partners.tolist(), strict=True))
    assert rows == sorted(rows)
    groups = [(seed, partners.tolist()) for seed, partners in first.groups()]
    assert [(seed, partner) for seed, partners in groups for partner in partners] == [(a, b) for a, _, b in rows]
    assert len(groups) == len(set(first.seeds.tolist()))


def test_unpairable_input_is_refused_with_the_reason(tmp_path: Path) -> None:
    texts, ids = make_documents(4)
    vectors = make_vectors(4)
    write_inputs(tmp_path / "good", texts, ids, vectors)
    with pytest.raises(UserError, match=r"no pair is left in the band.*at most.*set pair.similarity_low to a lower number"):
        run_pair(tmp_path / "good", similarity_low=0.9999)
    with pytest.raises(UserError, match=r"near-duplicates were dropped.*raise pair.near_duplicate_containment"):
        run_pair(tmp_path / "good", "duplicates", near_duplicate_containment=0.0)
    write_inputs(tmp_path / "few", texts[:15], ids[:15], vectors[:15])
    with pytest.raises(UserError, match="15 unique documents are too few to pair"):
        run_pair(tmp_path / "few")
    write_inputs(tmp_path / "one", texts, [f"book/{number}" for number in range(DOCUMENTS)], vectors)
    with pytest.raises(UserError, match="parts of one original"):
        run_pair(tmp_path / "one")
    write_inputs(tmp_path / "other", texts[::-1], ids, vectors)
    (tmp_path / "other/vectors").rename(tmp_path / "elsewhere")
    (tmp_path / "good/vectors").rename(tmp_path / "other/vectors")
    with pytest.raises(UserError, match="not the vectors of"):
        run_pair(tmp_path / "other")


def test_random_pairs_are_of_different_originals() -> None:
    groups = np.array([0, 0, 1, 2])
    drawn = Counter(zip(*(end.tolist() for end in random_pairs(groups, np.random.default_rng(0))), strict=True))
    assert set(drawn) == {(a, b) for a in range(4) for b in range(4) if groups[a] != groups[b]}
    assert max(drawn.values()) < 1.05 * min(drawn.values())
