"""Pairs of held-out documents: the criteria against brute force, the splits, other seeds, and kills."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paired_documents import DOCUMENTS, UNCAPPED, make_documents, make_vectors, qualifying, run_pair, write_inputs

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.pairs import find_heldout
from sbp_fast.pairs.heldout_pairs import NO_SEED, HeldoutPairs, assign_other_seeds
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.stages import pair as pair_stage

BAND: dict[str, Any] = {"similarity_low": 0.2, "similarity_high": 0.9, "near_duplicate_containment": 0.3}


def ordered(pairs: HeldoutPairs) -> list[tuple[int, int]]:
    return list(zip(pairs.seeds.tolist(), pairs.partners.tolist(), strict=True))


def qualifying_within(rows: np.ndarray, seed: int, high: float = 0.9, limit: float = 0.3) -> set[tuple[int, int]]:
    """The pairs that qualify among the documents `rows` alone, by the definition."""
    texts, ids = make_documents(seed)
    parts = [texts[row] for row in rows], [ids[row] for row in rows], make_vectors(seed)[rows]
    return {(int(rows[a]), int(rows[b])) for a, b in qualifying(*parts, 0.2, high, limit)}


@pytest.mark.parametrize("seed", range(4))
def test_heldout_pairs_are_all_that_qualify_within_each_split(tmp_path: Path, seed: int) -> None:
    write_inputs(tmp_path, *make_documents(seed), make_vectors(seed))
    _, counts = run_pair(tmp_path, **BAND, **UNCAPPED)
    prepared, pairs = PreparedCorpus(tmp_path / "corpus"), HeldoutPairs.load(tmp_path / "pairs")
    assert sorted([*prepared.validation, *prepared.test]) == list(range(DOCUMENTS))
    for split, rows in (("validation", prepared.validation), ("test", prepared.test)):
        part, expected = pairs.of_split(split), qualifying_within(rows, seed)
        assert len(part) == len(expected) > 20 and set(ordered(part)) == expected
        without = int((part.other_seeds == NO_SEED).sum())
        assert counts["heldout"][split] == {
            "documents": len(rows),
            "searched": len(rows),
            "pairs": len(part),
            "without_other_seed": without,
            "too_few": False,
        }
    vectors = make_vectors(seed)
    assert np.abs(pairs.similarities - (vectors[pairs.seeds] * vectors[pairs.partners]).sum(axis=1)).max() < 1e-6


def test_no_pair_and_no_other_seed_crosses_the_splits(tmp_path: Path) -> None:
    write_inputs(tmp_path, *make_documents(0), make_vectors(0))
    run_pair(tmp_path, similarity_low=-0.5, near_duplicate_containment=1.0, **UNCAPPED)
    prepared, pairs = PreparedCorpus(tmp_path / "corpus"), HeldoutPairs.load(tmp_path / "pairs")
    for split, rows in (("validation", prepared.validation), ("test", prepared.test)):
        part = pairs.of_split(split)
        assert set(part.seeds.tolist()) | set(part.partners.tolist()) <= set(rows.tolist())
        assert set(part.other_seeds.tolist()) <= {*part.seeds.tolist(), NO_SEED}
    assert not set(prepared.validation.tolist()) & set(prepared.test.tolist())


def test_degree_caps_hold_for_heldout_pairs_every_seeds_best_partner_first(tmp_path: Path) -> None:
    write_inputs(tmp_path, *make_documents(5), make_vectors(5))
    run_pair(tmp_path, "all", similarity_low=0.2, **UNCAPPED)
    run_pair(tmp_path, "capped", similarity_low=0.2, neighbors=DOCUMENTS, partners_per_seed=3, seeds_per_partner=2)
    everything, capped = (HeldoutPairs.load(tmp_path / name) for name in ("all", "capped"))
    taken: set[tuple[int, int]] = set()
    partners_of, seeds_of = Counter[int](), Counter[int]()
    rank = [everything.seeds[:index].tolist().count(seed) for index, seed in enumerate(everything.seeds.tolist())]
    turns = sorted(
        zip(rank, (-everything.similarities).tolist(), *map(list, zip(*ordered(everything), strict=True)), strict=True)
    )
    for _, _, seed, partner in turns:
        if partners_of[seed] < 3 and seeds_of[partner] < 2:
            partners_of[seed] += 1
            seeds_of[partner] += 1
            taken.add((seed, partner))
    assert set(ordered(capped)) == taken and len(capped) == len(taken) < len(everything)
    keys = list(zip(capped.splits != "validation", capped.seeds, -capped.similarities, capped.partners, strict=True))
    assert keys == sorted(keys)


def test_other_seeds_are_unrelated_to_the_partner_and_as_frequent_as_the_own_ones(tmp_path: Path) -> None:
    texts, ids = make_documents(2)
    vectors = make_vectors(2)
    write_inputs(tmp_path, texts, ids, vectors)
    run_pair(tmp_path, **BAND, **UNCAPPED)
    pairs = HeldoutPairs.load(tmp_path / "pairs")
    complete = pairs.other_seeds != NO_SEED
    assert complete.mean() > 0.9
    for seed, partner, other in zip(pairs.seeds[complete], pairs.partners[complete], pairs.other_seeds[complete], strict=True):
        assert other not in (seed, partner) and vectors[other] @ vectors[partner] < 0.2
        assert ids[other].split("/")[0] != ids[partner].split("/")[0]
    for split in ("validation", "test"):
        part = pairs.of_split(split)
        if (part.other_seeds != NO_SEED).all():
            assert Counter(part.other_seeds.tolist()) == Counter(part.seeds.tolist())


@pytest.mark.parametrize("topics", [1, 2, 3, 10])
def test_assigned_seeds_are_a_derangement_wherever_one_is_possible(topics: int) -> None:
    random = np.random.default_rng(topics)
    seeds = random.integers(0, 200, 400)
    partners = (seeds + topics * random.integers(1, 20, 400)) % (20 * topics * 10)  # of the seed's topic

    def unrelated(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return first % topics != second % topics

    others = assign_other_seeds(seeds, partners, unrelated, random.permutation(400).astype(np.uint64))
    if topics == 1:  # all are related to each other
        assert (others == NO_SEED).all()
        return
    valid = others != NO_SEED
    assert unrelated(others[valid], partners[valid]).all() and (others[valid] != seeds[valid]).all()
    largest = np.bincount(seeds % topics).max()
    assert (~valid).sum() == max(0, 2 * largest - 400)
    if valid.all():
        assert sorted(others.tolist()) == sorted(seeds.tolist())
    again = assign_other_seeds(seeds, partners, unrelated, random.permutation(400).astype(np.uint64))
    assert (again != others).any()


def test_of_many_heldout_documents_those_with_the_least_hashes_are_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find_heldout, "MAXIMUM_DOCUMENTS", 18)
    write_inputs(tmp_path, *make_documents(1), make_vectors(1))
    _, counts = run_pair(tmp_path, **BAND, **UNCAPPED)
    pairs, prepared = HeldoutPairs.load(tmp_path / "pairs"), PreparedCorpus(tmp_path / "corpus")
    assert {split: count["searched"] for split, count in counts["heldout"].items()} == {"validation": 18, "test": 18}
    expected = set()
    for rows in (prepared.validation, prepared.test):
        keys = [find_heldout.hash_name(str(prepared.heldout.ids[row]), 0) for row in rows]
        chosen = np.sort(rows[np.argsort(np.array(keys, np.uint64))[:18]])
        assert len(rows) > 18
        expected |= qualifying_within(chosen, 1)
    assert set(ordered(pairs)) == expected and len(expected) > 10


def test_heldout_pairs_are_the_same_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_inputs(tmp_path, *make_documents(3), make_vectors(3))
    run_pair(tmp_path, "whole", **BAND, **UNCAPPED)
    find = pair_stage.find_heldout_pairs

    def die(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    for stop_writing in (False, True):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if stop_writing:
                patch.setattr(HeldoutPairs, "write", die)
            else:
                patch.setattr(pair_stage, "find_heldout_pairs", die)
            run_pair(tmp_path, "killed", **BAND, **UNCAPPED)
    assert pair_stage.find_heldout_pairs is find
    run_pair(tmp_path, "killed", **BAND, **UNCAPPED)
    whole, killed = (Manifest.load(tmp_path / name) for name in ("whole", "killed"))
    assert (killed.files, killed.counts, killed.fingerprint) == (whole.files, whole.counts, whole.fingerprint)
    assert "heldout-pairs.parquet" in whole.files


def test_too_few_heldout_documents_are_recorded_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_inputs(tmp_path, *make_documents(3), make_vectors(3))
    monkeypatch.setattr(PreparedCorpus, "test", np.array([7]))
    monkeypatch.setattr(PreparedCorpus, "validation", np.zeros(0, np.int64))
    _, counts = run_pair(tmp_path, **BAND, **UNCAPPED)
    assert len(HeldoutPairs.load(tmp_path / "pairs")) == 0
    assert [(count["documents"], count["pairs"], count["too_few"]) for count in counts["heldout"].values()] == [
        (0, 0, True),
        (1, 0, True),
    ]


def test_loading_pairs_of_a_stage_without_them_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no pairs of held-out documents; run pair again with --force"):
        HeldoutPairs.load(tmp_path)
