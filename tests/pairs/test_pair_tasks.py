"""`pair` over partitions and ranges of documents: their sizes, threads and kills change no result."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from clustered import clustered_vectors
from paired_documents import QUIET, UNCAPPED, as_set, make_documents, make_vectors, run_pair, write_inputs

from sbp_fast.config import PairConfig, RunConfig
from sbp_fast.data.external_sort import write_rows
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import TransientError, UserError
from sbp_fast.neighbors.vectors import Vectors
from sbp_fast.pairs import caps, partitioned_self_join
from sbp_fast.pairs.criteria import apply_caps, rank_in_seed
from sbp_fast.pairs.document_statistics import DistinctDocuments
from sbp_fast.pairs.pairset import PairSet
from sbp_fast.pairs.tasks import Pairing
from sbp_fast.pipeline.executors.executor import Placement
from sbp_fast.pipeline.executors.local import LocalWorkers
from sbp_fast.stages.pair import pair


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


def test_pair_with_both_caps_reached_counts_for_the_seed_cap() -> None:
    partners_of, seeds_of = np.array([1, 0, 0], np.int32), np.array([0, 2, 0], np.int32)
    outcome = apply_caps(np.array([0, 2, 2, 2]), np.array([1, 1, 0, 0]), partners_of, seeds_of, 1, 2)
    assert outcome.tolist() == [1, 2, 0, 1]
    assert partners_of.tolist() == [1, 0, 1] and seeds_of.tolist() == [1, 2, 0]
    assert rank_in_seed(np.array([0, 0, 3, 3, 3, 9])).tolist() == [0, 1, 0, 1, 2, 0]


@pytest.mark.parametrize("backend", ["exact", "hnsw"])
@pytest.mark.parametrize("memory_gib", [1e-6, 2e-4, 6e-4])
def test_ranges_of_documents_change_no_file(backend: str, memory_gib: float, tmp_path: Path) -> None:
    write_inputs(tmp_path, *make_documents(3), make_vectors(3))
    settings = {"backend": backend, "similarity_low": 0.2, "near_duplicate_containment": 0.3, "neighbors": 20}
    whole, counts = run_pair(tmp_path, "whole", **settings)
    cut, cut_counts = run_pair(tmp_path, "cut", memory_gib=memory_gib, **settings)
    assert cut_counts == counts and counts["dropped"]["partner_cap"] > 0
    assert cut.fingerprint == whole.fingerprint
    with pytest.raises(UserError, match="was made from other settings or inputs"):
        run_pair(tmp_path, "whole", **{**settings, "neighbors": 19})


def test_more_pairs_than_a_row_group_holds_are_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbp_fast.pairs.pairset.ROW_GROUP", 7)
    write_inputs(tmp_path, *make_documents(3), make_vectors(3))
    for name, memory_gib in (("whole", 2.0), ("cut", 1e-4)):
        run_pair(tmp_path, name, similarity_low=0.2, memory_gib=memory_gib)
    assert (tmp_path / "whole/pairs.parquet").read_bytes() == (tmp_path / "cut/pairs.parquet").read_bytes()
    assert pq.ParquetFile(tmp_path / "cut/pairs.parquet").metadata.num_row_groups > 10


def test_partitions_find_the_same_pairs_and_resume_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    texts = [random.integers(3, 300, 30).tolist() for _ in range(1000)]
    write_inputs(tmp_path, texts, [f"letter-{number}" for number in range(1000)], clustered_vectors(1000))
    settings: dict[str, Any] = {"similarity_low": 0.7, "backend": "hnsw", "recall_queries": 1000}
    whole, counts = run_pair(tmp_path, "whole", **settings)
    assert counts["self_join"]["partitions"] == 1
    partitioned = {**settings, "partition_documents": 400, "target_recall": 0.97}
    routed, counts = run_pair(tmp_path, "routed", **partitioned)
    search = counts["self_join"]
    assert search["partitions"] == len(search["search_budgets"]) == 13 and search["largest_partition"] <= 400
    assert len(as_set(routed) & as_set(whole)) > 0.97 * len(whole)

    search_partition, searched = partitioned_self_join.search_partition, []

    def search_then_die(*arguments: Any) -> Any:
        searched.append(arguments[1].number)
        if len(searched) == 4:
            raise KeyboardInterrupt
        return search_partition(*arguments)

    monkeypatch.setattr(partitioned_self_join, "search_partition", search_then_die)
    with pytest.raises(KeyboardInterrupt):
        run_pair(tmp_path, "resumed", **partitioned)
    resumed, _ = run_pair(tmp_path, "resumed", **partitioned)
    assert searched == [0, 1, 2, 3, *range(3, 13)]
    assert resumed.fingerprint == routed.fingerprint
    for path in (tmp_path / "routed").rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            assert (tmp_path / "resumed" / path.relative_to(tmp_path / "routed")).read_bytes() == path.read_bytes()


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


@pytest.mark.parametrize("function", ["search_partition", "gather", "score_range", "write_ranks"])
@pytest.mark.parametrize("error", [TransientError("workers", "were lost", "rerun"), KeyboardInterrupt()])
def test_finished_tasks_are_not_repeated_after_workers_were_lost(function: str, error: BaseException, tmp_path: Path) -> None:
    write_inputs(tmp_path, *make_documents(0), make_vectors(0))
    settings = {"similarity_low": 0.2, "memory_gib": 1e-4, "partition_documents": 30, "target_recall": 0.5, "shingle_tokens": 4}
    config = RunConfig.model_validate({"threads": 1, "pair": settings})
    inputs = tmp_path / "corpus", tmp_path / "vectors"
    whole = Losing("", 0, error)
    expected = pair(config, *inputs, tmp_path / "whole", console=QUIET, workers=whole)
    assert min(whole.done[name] for name in ("search_partition", "gather", "score_range", "write_ranks")) >= 3
    broken, again = Losing(function, 1, error), Losing("", 0, error)
    with pytest.raises(type(error)):
        pair(config, *inputs, tmp_path / "out", console=QUIET, workers=broken)
    # the task at which the workers were lost had left its files
    manifest = pair(config, *inputs, tmp_path / "out", console=QUIET, workers=again)
    assert broken.done + again.done + Counter({function: 1}) == whole.done
    assert manifest.fingerprint == expected.fingerprint and manifest.counts == expected.counts


def test_killed_stage_resumes_with_its_partitions_under_another_memory_size(tmp_path: Path) -> None:
    write_inputs(tmp_path, *make_documents(0), make_vectors(0))
    inputs, manifests = (tmp_path / "corpus", tmp_path / "vectors"), {}
    for out, memory_gib, workers in (
        ("whole", 2.0, Losing("", 0, KeyboardInterrupt())),
        ("broken", 1e-4, Losing("score_range", 2, KeyboardInterrupt())),
        ("broken", 2e-4, again := Losing("", 0, KeyboardInterrupt())),
    ):
        settings = {"similarity_low": 0.2, "memory_gib": memory_gib, "shingle_tokens": 4}
        config = RunConfig.model_validate({"threads": 1, "pair": settings})
        with suppress(KeyboardInterrupt):
            manifests[out] = pair(config, *inputs, tmp_path / out, console=QUIET, workers=workers)
    assert again.done["search_partition"] == 0 and again.done["score_range"] > 1
    assert manifests["broken"].fingerprint == manifests["whole"].fingerprint


@pytest.mark.parametrize("backend", ["exact", "ivf", "hnsw"])
def test_threads_change_no_file(backend: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    texts = [random.integers(3, 300, 30).tolist() for _ in range(900)]
    write_inputs(tmp_path, texts, [f"letter-{number}" for number in range(900)], clustered_vectors(900))
    settings = {"similarity_low": 0.7, "backend": backend, "partition_documents": 500, "target_recall": 0.97}
    settings["shingle_tokens"] = 4
    manifests = []
    for threads in (1, 2):
        config, out = RunConfig.model_validate({"threads": threads, "pair": settings}), tmp_path / f"pairs-{threads}"
        manifests.append(pair(config, tmp_path / "corpus", tmp_path / "vectors", out, console=QUIET))
    assert manifests[0].counts["self_join"]["partitions"] > 1
    assert manifests[0].fingerprint == manifests[1].fingerprint and manifests[0].counts == manifests[1].counts


def test_as_many_ranks_are_taken_at_once_as_fit_into_memory(tmp_path: Path) -> None:
    write_inputs(tmp_path, *make_documents(3), make_vectors(3))
    corpus, vectors = PreparedCorpus(tmp_path / "corpus"), Vectors(tmp_path / "vectors")
    documents = DistinctDocuments.load(corpus, vectors, PairConfig(), tmp_path)
    config = RunConfig.model_validate({"pair": {"memory_gib": 256 * 100 / 2**30, "neighbors": 10}})  # for 100 pairs
    pairing = Pairing(config, documents, 0.0, tmp_path, tmp_path, QUIET, Placement("cpu", 1))
    pairing.file("sizes", 0).parent.mkdir(parents=True)
    for number in range(len(pairing.ranges)):
        sizes = np.array([30, 20, 10, 5] if number else [90, 10, 1], np.int64)
        write_rows(pairing.file("sizes", number), np.dtype([("pairs", "<i8")]), pairs=sizes)
    others = len(pairing.ranges) - 1
    total = np.array([90 + 30 * others, 10 + 20 * others, 1 + 10 * others, 5 * others])
    batches = caps._batches(pairing)
    assert others >= 3 and [low for low, _ in batches] == [0, *[high for _, high in batches[:-1]]] and batches[-1][1] == 4
    assert all(total[low:high].sum() <= 100 or high == low + 1 for low, high in batches)
    assert all(total[low : high + 1].sum() > 100 for low, high in batches[:-1])
