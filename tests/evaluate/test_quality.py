import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import QUIET, configure, make_corpus, make_stage
from typer.testing import CliRunner
from written_corpus import Row, fresh_tokens, make_written

from sbp_fast.cli import app
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.errors import UserError
from sbp_fast.evaluate import relevance
from sbp_fast.evaluate.novelty import NOVEL_TOKENS
from sbp_fast.evaluate.quality import near_duplicates, rate, same_letters
from sbp_fast.evaluate.relevance import Judged
from sbp_fast.pairs.pairset import PairSet, write_pairs
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.stages.filter import filter_documents
from sbp_fast.stages.quality import JUDGED, measure_quality

WIDTH, LOW = 6, 0.4
RANDOM = np.random.default_rng(7)
fresh = partial(fresh_tokens, RANDOM)
OVERRIDES = (
    "filter={minimum_tokens=10, shingle_tokens=6, copy_containment=0.2, minimum_compression_ratio=0.0}",
    "evaluate={continuation_questions=0}",
    "quality={judged_documents=4}",
)
PAIRS = np.array([[0, 1], [0, 2], [5, 6], [6, 5]])


class FakeEncoder:
    """Vectors that depend on the text alone; the real one has its own tests."""

    def __init__(self, *arguments: Any) -> None:
        self.dimension = 3

    def lengths_of(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([len(text) for text in texts])

    def encode(self, texts: Sequence[str], progress: Any = None, *, lengths: Any = None) -> np.ndarray:
        return np.stack([vector(text) for text in texts]).astype(np.float32)

    def flops(self, lengths: np.ndarray) -> float:
        return float(lengths.sum())


def vector(text: str) -> np.ndarray:
    values = np.random.default_rng(list(text.encode())).normal(size=3)
    return values / np.linalg.norm(values)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A corpus, pairs, synthetic documents and the filtered ones among them."""
    directory = tmp_path_factory.mktemp("quality")
    corpus = make_corpus(directory)

    def pair_body(work: Any) -> None:
        write_pairs(work.directory, [(*PAIRS.T, np.array([0.9, 0.8, 0.7, 0.7], np.float32))])
        work.record(band={"low": LOW, "high": 1.0, "low_origin": "auto"})

    pairs = make_stage("pair", corpus, directory / "pairs", pair_body)
    prepared = PreparedCorpus(corpus)
    head, foreign = (prepared.unique[i][1:-1][:11].tolist() for i in (0, 1))
    near, twice = fresh(40), fresh(9)
    rows: list[Row] = [
        (0, near, "end"),
        (5, [*near[:-1], 40], "end"),
        (7, fresh(30), "end"),
        (6, [*foreign[:8], *fresh(30)], "end"),
        (0, [*head, *fresh(20)], "end"),
        (5, [*foreign, *fresh(20)], "end"),
        (5, [*twice, *twice], "repetition"),
        (7, fresh(25), "length"),
    ]
    written = make_written(corpus, directory / "synthetic", rows)
    filtered = directory / "filtered"
    options = {"corpus": corpus, "synthetic": written}
    filter_documents(configure(directory, *OVERRIDES, "filter.duplicate_similarity=1.0"), filtered, **options, console=QUIET)
    assert len(Corpus(filtered)) == 4
    return {**options, "directory": directory, "pairs": pairs, "filtered": filtered}


def run(inputs: dict[str, Path], out: Path, *overrides: str) -> Manifest:
    config = configure(inputs["directory"], *OVERRIDES, *overrides)
    paths = {name: inputs[name] for name in ("corpus", "synthetic", "filtered", "pairs")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relevance, "open_encoder", FakeEncoder)
        return measure_quality(config, out, **paths, console=QUIET)


@pytest.fixture(scope="module")
def measured(inputs: dict[str, Path]) -> Manifest:
    return run(inputs, inputs["directory"] / "quality")


def bodies(corpus: Corpus) -> list[list[int]]:
    return [corpus[i][1:-1].tolist() for i in range(len(corpus))]


def runs(tokens: Sequence[int], width: int = WIDTH) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + width]) for i in range(len(tokens) - width + 1)]


def jaccard(a: Sequence[int], b: Sequence[int]) -> float:
    return len(set(runs(a)) & set(runs(b))) / len(set(runs(a)) | set(runs(b)))


def test_quality_rates_equal_brute_force(inputs: dict[str, Path], measured: Manifest) -> None:
    prepared, rates = PreparedCorpus(inputs["corpus"]), measured.counts["quality"]
    written, filtered = bodies(Corpus(inputs["synthetic"])), bodies(Corpus(inputs["filtered"]))
    unique, heldout = bodies(prepared.unique), bodies(prepared.heldout)
    real = set(itertools.chain.from_iterable(map(runs, unique)))

    def copies(body: list[int], known: set[Any]) -> bool:
        return len(set(runs(body)) & known) >= 0.2 * len(set(runs(body)))

    def twice(body: list[int]) -> bool:
        return len(set(runs(body))) < len(runs(body))

    def alike(texts: list[list[int]]) -> float:
        return float(np.mean([any(jaccard(a, b) >= 0.6 for j, b in enumerate(texts) if j != i) for i, a in enumerate(texts)]))

    seeds = [unique[seed] for seed in Corpus(inputs["synthetic"]).column("seed")]
    expected = {
        "repetition": (np.mean([twice(body) for body in written]), np.mean([twice(body) for body in heldout])),
        "duplicates": (alike(filtered), alike(unique[: len(filtered)])),
        "pair_containment": (np.mean([copies(b, set(runs(seed))) for b, seed in zip(written, seeds, strict=True)]), None),
        "corpus_copying": (np.mean([copies(b, real) for b in written]), np.mean([copies(body, real) for body in heldout])),
    }
    assert {name: (rates[name]["rate"], rates[name]["real_rate"]) for name in expected} == expected
    assert rates["duplicates"]["rate"] == 0.5 and rates["pair_containment"]["rate"] == 1 / 8
    assert rates["corpus_copying"]["rate"] == 2 / 8 and rates["repetition"]["rate"] == 1 / 8
    assert (rates["duplicates"]["documents"], rates["duplicates"]["real_documents"]) == (4, 4)
    assert rates["non_factual"]["rate"] is None and "judge" in rates["non_factual"]["how"]


def test_novel_shares_equal_brute_force(inputs: dict[str, Path], measured: Manifest) -> None:
    prepared = PreparedCorpus(inputs["corpus"])
    filtered, heldout, unique = map(bodies, (Corpus(inputs["filtered"]), prepared.heldout, prepared.unique))
    assert [line["tokens"] for line in measured.counts["novel"]] == list(NOVEL_TOKENS)
    for line in measured.counts["novel"]:
        known = set(itertools.chain.from_iterable(runs(body, line["tokens"]) for body in unique))
        for name, documents in (("synthetic", filtered), ("real_heldout", heldout)):
            present = [run for body in documents for run in set(runs(body, line["tokens"]))]
            assert line[name] == pytest.approx(1 - sum(run in known for run in present) / len(present), abs=1e-12)
    assert 0 < measured.counts["novel"][0]["real_heldout"] < 1


def test_quality_counts_lengths_stops_and_log_probabilities(inputs: dict[str, Path], measured: Manifest) -> None:
    counts, written = measured.counts, Corpus(inputs["synthetic"])
    assert counts["stops"] == {"end": 6 / 8, "length": 1 / 8, "repetition": 1 / 8}
    assert counts["log_probability"]["mean"] == pytest.approx(np.mean([-1 - i / 10 for i in range(8)]))
    assert sum(counts["log_probability"]["generated"]) == len(written)
    lengths = [len(body) for body in bodies(Corpus(inputs["filtered"]))]
    edges = counts["lengths"]["edges"]
    assert counts["lengths"]["synthetic"] == np.histogram(lengths, edges)[0].tolist() and sum(counts["lengths"]["real"]) == 4
    assert counts["measured"] == {
        "generated": 8,
        "passed": 4,
        "heldout": len(PreparedCorpus(inputs["corpus"]).heldout),
        "unique": 4,
    }


def test_rates_of_the_only_source_equal_the_rates_of_all(measured: Manifest) -> None:
    (source,) = measured.counts["sources"].values()
    quality = measured.counts["quality"]
    assert source["documents"] == 8 and source["judged"] == 4
    for name in ("repetition", "pair_containment", "corpus_copying", "pair_irrelevance"):
        assert source["rates"][name] == quality[name]["rate"]


def test_similarities_and_irrelevance_rate_equal_those_of_the_vectors(inputs: dict[str, Path], measured: Manifest) -> None:
    prepared, filtered, counts = PreparedCorpus(inputs["corpus"]), Corpus(inputs["filtered"]), measured.counts
    rows = pq.read_table(inputs["directory"] / "quality" / JUDGED).to_pylist()
    assert [row["id"] for row in rows] == filtered.ids.tolist()  # as many as are judged, so all are
    of = {row["id"]: vector(prepared.text(filtered, i)) for i, row in enumerate(rows)}
    unique = [vector(prepared.text(prepared.unique, i)) for i in range(len(prepared.unique))]
    partners = {0: {1, 2}, 5: {6}, 6: {5}, 7: {-1}}
    for row in rows:
        assert row["seed"] in partners and row["elsewhere"] != row["seed"] and row["neighbor"] in partners[row["seed"]]
        assert row["similarity_seed"] == pytest.approx(of[row["id"]] @ unique[row["seed"]], abs=1e-6)
        assert row["similarity_random"] == pytest.approx(of[row["id"]] @ unique[row["elsewhere"]], abs=1e-6)
        if row["neighbor"] >= 0:
            expected = unique[row["seed"]] @ unique[row["neighbor"]]
            assert row["similarity_neighbors"] == pytest.approx(expected, abs=1e-6)
    assert np.isnan([row["similarity_neighbors"] for row in rows]).sum() == 1
    own = np.array([row["similarity_seed"] for row in rows])
    assert counts["quality"]["pair_irrelevance"]["rate"] == np.mean(own < LOW) and 0 < np.mean(own < LOW) < 1
    assert counts["similarity"]["means"]["seed"] == pytest.approx(own.mean(), abs=1e-12)
    assert [sum(counts["similarity"]["histogram"][name]) for name in ("seed", "random", "neighbors")] == [4, 4, 3]
    texts = {id for row in rows for id in (row["seed"], row["elsewhere"], row["neighbor"]) if id >= 0}
    lengths = [len(prepared.text(prepared.unique, id)) for id in texts] + [len(prepared.text(filtered, i)) for i in range(4)]
    assert measured.flops == sum(lengths)


def test_quality_rerun_samples_the_same_documents(inputs: dict[str, Path], measured: Manifest, tmp_path: Path) -> None:
    again = run(inputs, tmp_path / "again")
    assert (again.fingerprint, again.counts) == (measured.fingerprint, measured.counts)
    few = run(inputs, tmp_path / "few", "quality.measured_documents=3", "quality.judged_documents=2")
    assert few.counts["measured"] == {"generated": 3, "passed": 3, "heldout": 3, "unique": 3}
    assert pq.read_table(tmp_path / "few" / JUDGED).num_rows == 2


def remake_pairs(inputs: dict[str, Path], out: Path, **counts: Any) -> dict[str, Path]:
    """Return the inputs with the same pairs under other counts."""

    def body(work: Any) -> None:
        write_pairs(work.directory, [(*PAIRS.T, np.array([0.9, 0.8, 0.7, 0.7], np.float32))])
        work.record(**counts)

    return inputs | {"pairs": make_stage("pair", inputs["corpus"], out, body)}


def test_pairs_of_vectors_made_elsewhere_leave_relevance_unmeasured_and_all_else_as_it_is(
    inputs: dict[str, Path], measured: Manifest, tmp_path: Path
) -> None:
    band = {"low": LOW, "high": 1.0, "low_origin": "auto"}
    counts = run(remake_pairs(inputs, tmp_path / "pairs", band=band, encoder="embed.file"), tmp_path / "out").counts
    rates, known = counts["quality"], measured.counts["quality"]
    assert rates.pop("pair_irrelevance")["rate"] is None and known["pair_irrelevance"]["rate"] is not None
    assert rates == {name: rate for name, rate in known.items() if name != "pair_irrelevance"}
    assert counts["similarity"] is None
    assert [source["rates"]["pair_irrelevance"] for source in counts["sources"].values()] == [None]


def test_quality_by_known_pairs_is_refused_since_they_have_no_band(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pairs: has known pairs: there is no band to measure documents by; give pairs found"):
        run(remake_pairs(inputs, tmp_path / "pairs"), tmp_path / "out")


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(0, 99))
def test_judged_sample_compares_with_another_seed_and_a_true_partner(seeds: list[int], seed: int) -> None:
    class Filtered(list[int]):
        def column(self, name: str) -> np.ndarray:
            return np.array(self)

    pairs = object.__new__(PairSet)
    pairs.seeds, pairs.partners = np.array([1, 1, 4]), np.array([7, 8, 9])
    judged = Judged.sample(Filtered(seeds), pairs, 5, seed)  # type: ignore[arg-type]
    assert len(judged.documents) == min(5, len(seeds)) == len(set(judged.documents.tolist()))
    if len(set(judged.seeds.tolist())) > 1:
        assert (judged.elsewhere != judged.seeds).all()
    allowed = {1: {7, 8}, 4: {9}}
    assert all(
        near in allowed.get(own, {-1}) for own, near in zip(judged.seeds.tolist(), judged.neighbors.tolist(), strict=True)
    )


def test_rate_has_the_wilson_interval() -> None:
    interval = rate(np.array([True] * 3 + [False] * 47), "how")
    share, documents, z = 0.06, 50, 1.959963984540054
    middle = (share + z**2 / (2 * documents)) / (1 + z**2 / documents)
    half = z / (1 + z**2 / documents) * np.sqrt(share * (1 - share) / documents + z**2 / (4 * documents**2))
    assert (interval["rate"], interval["low"], interval["high"]) == pytest.approx(
        (share, middle - half, middle + half), abs=1e-12
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_near_duplicates_equal_brute_force(seed: int) -> None:
    random = np.random.default_rng(seed)
    originals = [random.integers(0, 4, random.integers(4, 40)) for _ in range(6)]
    texts = []
    for _ in range(25):
        body = originals[random.integers(6)].copy()
        body[random.integers(len(body), size=random.integers(0, 4))] = random.integers(0, 4)
        texts.append(body)
    sets = [{tuple(body[i : i + 3].tolist()) for i in range(len(body) - 2)} for body in texts]
    expected = [any(5 * len(a & b) >= 3 * len(a | b) for j, b in enumerate(sets) if j != i) for i, a in enumerate(sets)]
    assert near_duplicates(texts, 3).tolist() == expected


def test_same_letters_ignores_space_and_punctuation_and_nothing_else(inputs: dict[str, Path], tmp_path: Path) -> None:
    prepared = PreparedCorpus(inputs["corpus"])
    text = prepared.text(prepared.unique, 3)
    variants = [text, text.replace(" ", ",\n  "), text + " red", text.replace("t", "d", 1)]
    rows: list[Row] = [(3, prepared.tokenizer.encode(variant), "end") for variant in variants]
    written = Corpus(make_written(inputs["corpus"], tmp_path / "synthetic", [*rows, (4, rows[0][1], "end")]))
    assert same_letters(prepared, written, np.arange(5)).tolist() == [True, True, False, False, False]
    assert same_letters(prepared, written, np.array([1, 4])).tolist() == [True, False]


def test_quality_of_inputs_that_do_not_belong_together_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    other = make_written(inputs["corpus"], tmp_path / "other", [(0, fresh(int(RANDOM.integers(20, 30))), "end")])
    with pytest.raises(UserError, match=r"filtered: was not made from .*other; give the output of filter on it"):
        run({**inputs, "synthetic": other}, tmp_path / "out")
    foreign = make_stage("pair", other, tmp_path / "pairs", lambda work: None)
    with pytest.raises(UserError, match=r"pairs: was not made from .*corpus; give the output of pair on it"):
        run({**inputs, "pairs": foreign}, tmp_path / "out")


def test_quality_command_writes_the_stage(inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relevance, "open_encoder", FakeEncoder)
    options = [text for name in ("corpus", "synthetic", "filtered", "pairs") for text in (f"--{name}", str(inputs[name]))]
    settings = [f"corpus.path={inputs['directory']}/documents.jsonl", *OVERRIDES, "threads=1"]
    result = CliRunner().invoke(app, ["quality", "small", *settings, *options, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0 and Manifest.load(tmp_path / "out", "quality").counts["quality"]
