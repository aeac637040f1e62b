import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from clustered import clustered_vectors

from sbp_fast.config import EmbedConfig, PairConfig, RunConfig
from sbp_fast.corpus.corpus_writer import CorpusWriter
from sbp_fast.corpus.prepared import PreparedCorpus
from sbp_fast.corpus.shingles import DocumentShingles
from sbp_fast.corpus.tokenizer import train_tokenizer
from sbp_fast.errors import Unreachable, UserError
from sbp_fast.files import read_json
from sbp_fast.pairs import joined as joined_module
from sbp_fast.pairs.copies import first_of_near_copies
from sbp_fast.pairs.documents import Documents
from sbp_fast.pairs.join.exact import ExactJoin
from sbp_fast.pairs.pair import pair
from sbp_fast.pairs.pairset import PairSet
from sbp_fast.pairs.select import random_pairs, take_in_turn, turns
from sbp_fast.pairs.vectors import Vectors
from sbp_fast.progress import Console
from sbp_fast.stage import Work, run_stage
from sbp_fast.workers.local import LocalWorkers

QUIET = Console(quiet=True)
DOCUMENTS, BEGIN, END = 60, 0, 1
UNCAPPED: dict[str, Any] = {"neighbours": DOCUMENTS, "partners_per_seed": DOCUMENTS, "seeds_per_partner": DOCUMENTS}


def make_documents(seed: int) -> tuple[list[list[int]], list[str]]:
    """Random token strings, three parts to an original; some are spliced from another, some are copies, exact or nearly."""
    random = np.random.default_rng(seed)
    texts = [random.integers(3, 300, random.integers(2, 60)).tolist() for _ in range(DOCUMENTS)]
    for number in range(3, DOCUMENTS, 2):
        texts[number][5:] = texts[number - 3][: random.integers(0, 40)]
    texts[30], texts[41] = texts[7], texts[7]
    texts[24] = random.integers(3, 300, 40).tolist()
    texts[50], texts[57] = [*texts[24], 299], texts[24][1:]
    return texts, [f"letter-{number // 3}/{number % 3}" for number in range(DOCUMENTS)]


def make_vectors(seed: int, documents: int = DOCUMENTS) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((documents, 6)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_inputs(directory: Path, texts: list[list[int]], ids: list[str], vectors: np.ndarray) -> tuple[Path, Path]:
    """What `prepare` and `embed` would have written."""

    def write_corpus(work: Work) -> None:
        train_tokenizer(["a few words"], 300).save(work.directory / "tokenizer.json")
        for part in ("train", "heldout"):
            writer = CorpusWriter(work.directory / part, 300)
            for tokens, id in zip(texts, ids, strict=True):
                writer.add([BEGIN, *tokens, END], id=id, source="letters", text_bytes=1)
            writer.close()
        work.record(unique_documents=len(texts), embedded=False, sources={"letters": len(texts)})

    def write_vectors(work: Work) -> None:
        np.save(work.directory / "vectors-00000.npy", vectors[:20])
        np.save(work.directory / "vectors-00001.npy", vectors[20:])

    corpus, out = directory / "corpus", directory / "vectors"
    config = {"corpus": {"group_separator": "/"}}
    run_stage("prepare", corpus, config=config, inputs={}, body=write_corpus, console=QUIET)
    embed = {"embed": EmbedConfig().model_dump(mode="json")}
    run_stage("embed", out, config=embed, inputs={"corpus": corpus}, body=write_vectors, console=QUIET)
    return corpus, out


def run_pair(directory: Path, out: str = "pairs", **settings: Any) -> tuple[PairSet, dict[str, Any]]:
    config = RunConfig.model_validate({"threads": 1, "pair": {"shingle_tokens": 4, "recall_queries": DOCUMENTS, **settings}})
    manifest = pair(config, directory / "corpus", directory / "vectors", directory / out, console=QUIET)
    return PairSet(directory / out), manifest.counts


def shingles(tokens: list[int]) -> set[tuple[int, ...]]:
    return {tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)} if len(tokens) >= 4 else {tuple(tokens)}


def representatives(texts: list[list[int]], share: float = 0.8) -> list[int]:
    """Documents that neither equal an earlier one nor are near-copies of an earlier representative."""
    found: list[int] = []
    for row, tokens in enumerate(texts):
        if texts.index(tokens) == row:
            held = ((shingles(tokens), shingles(texts[other])) for other in found)
            if all(len(mine & theirs) < share * max(len(mine), len(theirs)) for mine, theirs in held):
                found.append(row)
    return found


def qualifying(texts: list[list[int]], ids: list[str], vectors: np.ndarray, low: float, high: float, limit: float) -> set:
    """The ordered pairs that qualify, by the definition alone."""
    firsts = representatives(texts)
    pairs = set()
    for a in firsts:
        for b in firsts:
            mine, theirs = shingles(texts[a]), shingles(texts[b])
            near_copy = len(mine & theirs) >= limit * min(len(mine), len(theirs))
            if a != b and low <= vectors[a] @ vectors[b] <= high and not near_copy:
                pairs |= {(a, b)} if ids[a].split("/")[0] != ids[b].split("/")[0] else set()
    return pairs


def as_set(pairs: PairSet) -> set[tuple[int, int]]:
    return set(zip(pairs.seeds.tolist(), pairs.partners.tolist(), strict=True))


@pytest.mark.parametrize("backend", ["exact", "bucket", "hnswlib"])
@pytest.mark.parametrize("seed", range(4))
def test_without_caps_the_pairs_are_all_that_qualify(tmp_path: Path, seed: int, backend: str) -> None:
    texts, ids = make_documents(seed)
    vectors = make_vectors(seed)
    write_inputs(tmp_path, texts, ids, vectors)
    band = {"similarity_low": 0.2, "similarity_high": 0.9, "near_copy_containment": 0.3}
    pairs, counts = run_pair(tmp_path, backend=backend, target_recall=1.0, **band, **UNCAPPED)
    expected = qualifying(texts, ids, vectors, 0.2, 0.9, 0.3)
    assert as_set(pairs) == expected and len(pairs) == len(expected) > 200
    assert np.abs(pairs.scores - (vectors[pairs.seeds] * vectors[pairs.partners]).sum(axis=1)).max() < 1e-6
    assert counts["seeds"] == len({a for a, _ in expected})
    dropped = counts["dropped"]
    near = DOCUMENTS - 2 - len(representatives(texts))
    assert near >= 2 and counts["copies"] == {"exact_copies": 2, "near_copies": near, "same_vector_copies": 0}
    assert min(dropped[fault] for fault in ("below_band", "above_band", "same_group", "near_copies")) > 0
    every_pair = len(representatives(texts)) * (len(representatives(texts)) - 1)
    if backend == "exact":
        assert counts["candidates"] == every_pair == len(expected) + sum(dropped.values())
    assert counts["recall"]["recall"] == 1.0 and counts["join"]["backend"] == backend
    assert sum(counts["containment"]["pairs"][:6]) == len(expected) and sum(counts["containment"]["pairs"][6:]) == 0


def test_pairs_of_one_original_are_kept_where_asked(tmp_path: Path) -> None:
    texts, ids = make_documents(0)
    write_inputs(tmp_path, texts, ids, make_vectors(0))
    band = {"similarity_low": 0.2, "near_copy_containment": 0.3}
    pairs, _ = run_pair(tmp_path, exclude_same_group=False, **band, **UNCAPPED)
    ungrouped = [str(number) for number in range(DOCUMENTS)]
    assert as_set(pairs) == qualifying(texts, ungrouped, make_vectors(0), 0.2, 1.0, 0.3)


def test_caps_hold_and_drop_nothing_for_which_there_is_room(tmp_path: Path) -> None:
    texts, ids = make_documents(5)
    write_inputs(tmp_path, texts, ids, make_vectors(5))
    everything, _ = run_pair(tmp_path, "all", similarity_low=0.2, **UNCAPPED)
    capped = {"similarity_low": 0.2, "neighbours": DOCUMENTS, "partners_per_seed": 4, "seeds_per_partner": 3}
    pairs, counts = run_pair(tmp_path, "capped", **capped)
    partners_of, seeds_of = Counter(pairs.seeds.tolist()), Counter(pairs.partners.tolist())
    assert max(partners_of.values()) <= 4 and max(seeds_of.values()) == 3
    left_out = as_set(everything) - as_set(pairs)
    assert as_set(pairs) < as_set(everything) and len(left_out) == sum(
        counts["dropped"][cap] for cap in ("seed_cap", "partner_cap")
    )
    assert all(partners_of[seed] == 4 or seeds_of[partner] == 3 for seed, partner in left_out)


def capped_by_hand(pairs: PairSet, most_partners: int, most_seeds: int) -> set[tuple[int, int]]:
    """Of all ordered pairs those that the caps leave, every seed's best first, of them the most similar first."""
    turn = [place for _, partners in pairs.groups() for place in range(len(partners))]
    ordered = sorted(zip(turn, (-pairs.scores).tolist(), pairs.seeds.tolist(), pairs.partners.tolist(), strict=True))
    partners_of, seeds_of, taken = Counter[int](), Counter[int](), set()
    for _, _, seed, partner in ordered:
        if partners_of[seed] < most_partners and seeds_of[partner] < most_seeds:
            partners_of[seed] += 1
            seeds_of[partner] += 1
            taken.add((seed, partner))
    return taken


@pytest.mark.parametrize("memory_gib", [2.0, 1e-4])
def test_caps_take_every_seeds_best_partner_before_any_second(memory_gib: float, tmp_path: Path) -> None:
    write_inputs(tmp_path, *make_documents(6), make_vectors(6))
    everything, _ = run_pair(tmp_path, "all", similarity_low=0.2, **UNCAPPED)
    caps = {**UNCAPPED, "partners_per_seed": 5, "seeds_per_partner": 3}
    pairs, counts = run_pair(tmp_path, "capped", similarity_low=0.2, memory_gib=memory_gib, **caps)
    expected = capped_by_hand(everything, 5, 3)
    assert as_set(pairs) == expected and len(pairs) == len(expected) > 100
    assert counts["dropped"]["seed_cap"] > 0 and counts["dropped"]["partner_cap"] > 0


def test_the_seed_is_what_was_full_where_both_were() -> None:
    partners_of, seeds_of = np.array([1, 0, 0], np.int32), np.array([0, 2, 0], np.int32)
    outcome = take_in_turn(np.array([0, 2, 2, 2]), np.array([1, 1, 0, 0]), partners_of, seeds_of, 1, 2)
    assert outcome.tolist() == [1, 2, 0, 1]
    assert partners_of.tolist() == [1, 0, 1] and seeds_of.tolist() == [1, 2, 0]
    assert turns(np.array([0, 0, 3, 3, 3, 9])).tolist() == [0, 1, 0, 1, 2, 0]


@pytest.mark.parametrize("backend", ["exact", "hnswlib"])
@pytest.mark.parametrize("memory_gib", [1e-6, 2e-4, 6e-4])
def test_ranges_of_documents_change_no_file(backend: str, memory_gib: float, tmp_path: Path) -> None:
    write_inputs(tmp_path, *make_documents(3), make_vectors(3))
    settings = {"backend": backend, "similarity_low": 0.2, "near_copy_containment": 0.3, "neighbours": 20}
    whole, counts = run_pair(tmp_path, "whole", **settings)
    cut, cut_counts = run_pair(tmp_path, "cut", memory_gib=memory_gib, **settings)
    assert cut_counts == counts and counts["dropped"]["partner_cap"] > 0
    assert cut.fingerprint == whole.fingerprint
    with pytest.raises(UserError, match="was made from something else"):
        run_pair(tmp_path, "whole", **{**settings, "neighbours": 19})


def test_more_pairs_than_a_row_group_holds_are_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbp_fast.pairs.pairset.ROW_GROUP", 7)
    write_inputs(tmp_path, *make_documents(3), make_vectors(3))
    for name, memory_gib in (("whole", 2.0), ("cut", 1e-4)):
        run_pair(tmp_path, name, similarity_low=0.2, memory_gib=memory_gib)
    assert (tmp_path / "whole/pairs.parquet").read_bytes() == (tmp_path / "cut/pairs.parquet").read_bytes()
    assert pq.ParquetFile(tmp_path / "cut/pairs.parquet").metadata.num_row_groups > 10


def test_automatic_cut_off_is_what_the_given_share_of_random_pairs_exceeds(tmp_path: Path) -> None:
    texts, ids = make_documents(1)
    vectors = make_vectors(1)
    write_inputs(tmp_path, texts, ids, vectors)
    _, counts = run_pair(tmp_path, random_pair_rate=0.05)
    rows = representatives(texts)
    differ = [vectors[a] @ vectors[b] for a in rows for b in rows if a // 3 != b // 3]
    assert counts["band"]["low_origin"] == "auto"
    assert counts["random_pair_rate"] == pytest.approx(0.05, abs=1e-3)
    assert np.mean(np.array(differ) >= counts["band"]["low"]) == pytest.approx(0.05, abs=3e-3)


def test_recall_is_what_the_exact_search_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, ids = make_documents(2)
    vectors = make_vectors(2)
    write_inputs(tmp_path, texts, ids, vectors)
    rows = representatives(texts)
    count = len(rows)
    poor = np.random.default_rng(0).permuted(np.tile(np.arange(count), (count, 1)), axis=1)
    poor = np.stack([row[row != number][:10] for number, row in enumerate(poor)])
    scores = np.einsum("nd,nkd->nk", vectors[rows], vectors[rows][poor])

    def search(self: ExactJoin, rows: np.ndarray, k: int, *_: object) -> tuple[np.ndarray, np.ndarray]:
        return poor[rows], scores[rows]

    monkeypatch.setattr(ExactJoin, "search", search)
    band = {"similarity_low": 0.2, "neighbours": 10, "near_copy_containment": 0.3}
    _, counts = run_pair(tmp_path, target_recall=0.1, **band)
    allowed = qualifying(texts, ids, vectors, 0.2, 1.0, 0.3)
    candidates = {(rows[a], rows[b]) for a, others in enumerate(poor) for b in others}
    candidates |= {(b, a) for a, b in candidates}
    products = vectors[rows] @ vectors[rows].T
    nearest = {(rows[a], rows[b]) for a in range(count) for b in np.argsort(-products[a])[1:11]}
    assert counts["recall"]["pairs"] == len(nearest & allowed)
    assert counts["recall"]["found"] == len(nearest & allowed & candidates)
    assert 0.1 < counts["recall"]["recall"] < 0.8
    with pytest.raises(UserError, match=r"of the \d+ pairs in the band .*target_recall is 0.9; lower pair.target_recall"):
        run_pair(tmp_path, "refused", target_recall=0.9, **band)
    run_pair(tmp_path, "refused", target_recall=0.1, **band)  # nothing is left of the refused one to stand in the way


def test_copies_are_collapsed_into_the_first_and_listed(tmp_path: Path) -> None:
    texts, ids = make_documents(3)
    vectors = make_vectors(3)
    vectors[55] = vectors[11]  # another text, of which the encoder saw the same head
    write_inputs(tmp_path, texts, ids, vectors)
    pairs, counts = run_pair(tmp_path, similarity_low=-1.0, near_copy_containment=1.0, **UNCAPPED)
    table = pq.read_table(tmp_path / "pairs/copies.parquet").to_pydict()
    into = dict(zip(table["document"], zip(table["representative"], table["kind"], strict=True), strict=True))
    seven = into.get(7, (7, ""))[0]
    planted = {30: (seven, "exact"), 41: (seven, "exact"), 50: (24, "near"), 57: (24, "near"), 55: (11, "same vector")}
    assert planted.items() <= into.items()
    assert set(into) == set(range(DOCUMENTS)) - set(representatives(texts)) | {55}
    assert {kind: list(table["kind"]).count(kind) for kind in ("exact", "near", "same vector")} == {
        kind.removesuffix("_copies").replace("_", " "): count for kind, count in counts["copies"].items()
    }
    assert not set(into) & set(pairs.seeds.tolist())


@pytest.mark.parametrize("held", [300, 65_536])
def test_near_copies_are_found_at_any_place_and_number(held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr("sbp_fast.corpus.shingles.HELD_DOCUMENTS", held)
    first = first_of_near_copies(DocumentShingles(len(texts), texts.__getitem__, 13), 0.8, tmp_path)
    copies = np.array([50 + 41 * number + place for number in range(50) for place in range(40)])
    assert (first[copies] == np.repeat(np.arange(50), 40)).mean() > 0.999
    others = np.setdiff1d(np.arange(len(texts)), copies)
    assert (first[others] == others).all()


def test_cells_find_the_same_pairs_and_resume_where_they_were_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    texts = [random.integers(3, 300, 30).tolist() for _ in range(1000)]
    write_inputs(tmp_path, texts, [f"letter-{number}" for number in range(1000)], clustered_vectors(1000))
    settings: dict[str, Any] = {"similarity_low": 0.7, "backend": "hnswlib", "recall_queries": 1000}
    whole, counts = run_pair(tmp_path, "whole", **settings)
    assert counts["join"]["cells"] == 1
    cells = {**settings, "cell_documents": 400, "target_recall": 0.97}
    routed, counts = run_pair(tmp_path, "routed", **cells)
    assert counts["join"]["cells"] == len(counts["join"]["efforts"]) == 10 and counts["join"]["largest_cell"] <= 400
    assert len(as_set(routed) & as_set(whole)) > 0.97 * len(whole)

    join, joined = joined_module._join_cell, []

    def join_then_die(*arguments: Any) -> Any:
        joined.append(arguments[1].number)
        if len(joined) == 4:
            raise KeyboardInterrupt
        return join(*arguments)

    monkeypatch.setattr(joined_module, "_join_cell", join_then_die)
    with pytest.raises(KeyboardInterrupt):
        run_pair(tmp_path, "resumed", **cells)
    resumed, _ = run_pair(tmp_path, "resumed", **cells)
    assert joined == [0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9]
    assert resumed.fingerprint == routed.fingerprint
    for path in (tmp_path / "routed").rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            assert (tmp_path / "resumed" / path.relative_to(tmp_path / "routed")).read_bytes() == path.read_bytes()


def test_documents_are_the_same_in_another_process(tmp_path: Path) -> None:
    write_inputs(tmp_path, *make_documents(0), make_vectors(0))
    settings = PairConfig(shingle_tokens=4)
    here = Documents.load(PreparedCorpus(tmp_path / "corpus"), Vectors(tmp_path / "vectors"), settings, tmp_path)
    there = pickle.loads(pickle.dumps(here))
    assert len(here) < DOCUMENTS - 3 and np.array_equal(there.rows, here.rows) and np.array_equal(there.groups, here.groups)
    assert np.array_equal(there.vectors[np.arange(len(here))], here.vectors[np.arange(len(here))])
    first, second = np.triu_indices(len(here), 1)
    shares = [documents.shingles.containment(first, second) for documents in (here, there)]
    assert np.array_equal(*shares) and np.max(shares) > 0.5


class Losing(LocalWorkers):
    """Workers that are lost, by `error`, at the task `number` of a function."""

    def __init__(self, function: str, number: int, error: BaseException) -> None:
        self.function, self.number, self.error, self.done = function, number, error, Counter[str]()

    @contextmanager
    def hold(self, make: Any, config: RunConfig) -> Iterator[Any]:
        with super().hold(make, config) as holders:
            run = holders.run

            def counted(function: Any, tasks: Any, advance: Any) -> Iterator[Any]:
                for result in run(function, tasks, advance):
                    if (function.__name__, self.done[function.__name__]) == (self.function, self.number):
                        raise self.error
                    self.done[function.__name__] += 1
                    yield result

            holders.run = counted
            yield holders


@pytest.mark.parametrize("function", ["_join_cell", "gather", "judge_range", "write_turns"])
@pytest.mark.parametrize("error", [Unreachable("workers", "were lost", "rerun"), KeyboardInterrupt()])
def test_what_is_done_is_not_done_again_where_workers_were_lost(function: str, error: BaseException, tmp_path: Path) -> None:
    write_inputs(tmp_path, *make_documents(0), make_vectors(0))
    settings = {"similarity_low": 0.2, "memory_gib": 1e-4, "cell_documents": 30, "target_recall": 0.5, "shingle_tokens": 4}
    config = RunConfig.model_validate({"threads": 1, "pair": settings})
    inputs = tmp_path / "corpus", tmp_path / "vectors"
    whole = Losing("", 0, error)
    expected = pair(config, *inputs, tmp_path / "whole", console=QUIET, workers=whole)
    assert min(whole.done[name] for name in ("_join_cell", "gather", "judge_range", "write_turns")) >= 3
    broken, again = Losing(function, 1, error), Losing("", 0, error)
    with pytest.raises(type(error)):
        pair(config, *inputs, tmp_path / "out", console=QUIET, workers=broken)
    # the task at which the workers were lost had left its files
    manifest = pair(config, *inputs, tmp_path / "out", console=QUIET, workers=again)
    assert broken.done + again.done + Counter({function: 1}) == whole.done
    assert manifest.fingerprint == expected.fingerprint and manifest.counts == expected.counts


def test_with_another_memory_a_killed_stage_goes_on_from_its_cells(tmp_path: Path) -> None:
    write_inputs(tmp_path, *make_documents(0), make_vectors(0))
    inputs, manifests = (tmp_path / "corpus", tmp_path / "vectors"), {}
    for out, memory_gib, workers in (
        ("whole", 2.0, Losing("", 0, KeyboardInterrupt())),
        ("broken", 1e-4, Losing("judge_range", 2, KeyboardInterrupt())),
        ("broken", 2e-4, again := Losing("", 0, KeyboardInterrupt())),
    ):
        settings = {"similarity_low": 0.2, "memory_gib": memory_gib, "shingle_tokens": 4}
        config = RunConfig.model_validate({"threads": 1, "pair": settings})
        with suppress(KeyboardInterrupt):
            manifests[out] = pair(config, *inputs, tmp_path / out, console=QUIET, workers=workers)
    assert again.done["_join_cell"] == 0 and again.done["judge_range"] > 1
    assert manifests["broken"].fingerprint == manifests["whole"].fingerprint


@pytest.mark.parametrize("backend", ["exact", "bucket", "hnswlib"])
def test_threads_change_no_file(backend: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    texts = [random.integers(3, 300, 30).tolist() for _ in range(900)]
    write_inputs(tmp_path, texts, [f"letter-{number}" for number in range(900)], clustered_vectors(900))
    settings = {"similarity_low": 0.7, "backend": backend, "cell_documents": 500, "target_recall": 0.97, "shingle_tokens": 4}
    manifests = []
    for threads in (1, 2):
        config, out = RunConfig.model_validate({"threads": threads, "pair": settings}), tmp_path / f"pairs-{threads}"
        manifests.append(pair(config, tmp_path / "corpus", tmp_path / "vectors", out, console=QUIET))
    assert manifests[0].counts["join"]["cells"] > 1
    assert manifests[0].fingerprint == manifests[1].fingerprint and manifests[0].counts == manifests[1].counts


def test_examples_show_every_bin_of_similarity(tmp_path: Path) -> None:
    texts, ids = make_documents(3)
    write_inputs(tmp_path, texts, ids, make_vectors(3))
    pairs, counts = run_pair(tmp_path, similarity_low=0.2, near_copy_containment=0.3, **UNCAPPED)
    bins = read_json(tmp_path / "pairs/examples.json")
    assert sum(bin["candidates"] for bin in bins) * 2 == counts["candidates"]
    assert sum(bin["kept"] for bin in bins) * 2 == len(pairs)
    rows, faults = {id: row for row, id in enumerate(ids)}, set()
    for bin in bins:
        assert len(bin["examples"]) == min(3, bin["candidates"])
        for example in bin["examples"]:
            pair = rows[example["first"]["id"]], rows[example["second"]["id"]]
            assert bin["low"] <= example["similarity"] <= bin["high"] or bin["low"] == 0
            assert (example["fault"] is None) == (pair in as_set(pairs))
            faults.add(example["fault"])
    assert {None, "below_band"} <= faults


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


def test_what_cannot_be_paired_is_explained(tmp_path: Path) -> None:
    texts, ids = make_documents(4)
    vectors = make_vectors(4)
    write_inputs(tmp_path / "good", texts, ids, vectors)
    with pytest.raises(UserError, match=r"no pair is left in the band.*at most.*set pair.similarity_low to a lower number"):
        run_pair(tmp_path / "good", similarity_low=0.9999)
    with pytest.raises(UserError, match=r"near-copies were dropped.*raise pair.near_copy_containment"):
        run_pair(tmp_path / "good", "copies", near_copy_containment=0.0)
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
