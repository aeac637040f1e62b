import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import QUIET, configure, make_corpus, make_stage

from sbp_fast.corpus.prepared import PreparedCorpus
from sbp_fast.corpus.shards import Corpus, CorpusWriter
from sbp_fast.errors import UserError
from sbp_fast.pairs.pairset import write_pairs
from sbp_fast.stage import Manifest
from sbp_fast.synthesize import quality
from sbp_fast.synthesize.filter import REJECTED, filter_documents
from sbp_fast.synthesize.quality import near_duplicates, rate, same_letters

WIDTH, LOW = 6, 0.4
OVERRIDES = (
    "filter={minimum_tokens=10, shingle_tokens=6, copy_containment=0.2, judged_documents=4, maximum_repeated_shingles=0.0}",
)
RANDOM = np.random.default_rng(7)


class FakeEncoder:
    """Vectors that depend on the text alone; the real one has its own tests."""

    def __init__(self, *arguments: Any) -> None:
        self.dimension = 3

    def count_tokens(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([len(text) for text in texts])

    def encode(self, texts: Sequence[str], progress: Any = None, *, lengths: Any = None) -> np.ndarray:
        return np.stack([vector(text) for text in texts]).astype(np.float32)

    def flops(self, lengths: np.ndarray) -> float:
        return float(lengths.sum())


def vector(text: str) -> np.ndarray:
    drawn = np.random.default_rng(list(text.encode())).normal(size=3)
    return drawn / np.linalg.norm(drawn)


def fresh(tokens: int) -> list[int]:
    """Tokens in an order that no real document has."""
    return RANDOM.integers(3, 250, tokens).tolist()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("filter")
    corpus = make_corpus(directory)

    def pair_body(work: Any) -> None:
        write_pairs(work.directory, np.array([0]), np.array([1]), np.array([0.9], np.float32))
        work.record(band={"low": LOW, "high": 1.0, "low_origin": "auto"})

    make_stage("pair", corpus, directory / "pairs", pair_body)
    return {"directory": directory, "corpus": corpus, "pairs": directory / "pairs"}


def make_written(inputs: dict[str, Path], out: Path, rows: list[tuple[int, list[int], bool]]) -> Path:
    """A finished stage `synthesize` of (seed, tokens, finished)."""
    tokenizer = PreparedCorpus(inputs["corpus"]).tokenizer

    def body(work: Any) -> None:
        writer = CorpusWriter(work.directory, tokenizer.vocabulary_size)
        for number, (seed, tokens, finished) in enumerate(rows):
            facts = {"id": f"synthetic/{seed}/{number}", "source": "synthetic", "text_bytes": len(tokenizer.decode(tokens))}
            stored = [tokenizer.begin, *tokens, tokenizer.end]
            writer.add(stored, **facts, seed=seed, sample=number, finished=finished)
        writer.close()

    return make_stage("synthesize", inputs["corpus"], out, body)


def run(inputs: dict[str, Path], synthetic: Path, out: Path, *overrides: str) -> Manifest:
    config = configure(inputs["directory"], *OVERRIDES, *overrides)
    paths = {"corpus": inputs["corpus"], "synthetic": synthetic, "pairs": inputs["pairs"]}
    return filter_documents(config, out, **paths, console=QUIET)


def constructed(inputs: dict[str, Path]) -> list[tuple[str, tuple[int, list[int], bool]]]:
    """Documents and what becomes of each; the copies lie on both sides of the threshold, 4 and 3 of 20 shingles."""
    unique = PreparedCorpus(inputs["corpus"]).unique
    longest = sorted(range(len(unique)), key=lambda i: -len(unique[i]))
    seed, other = longest[0], longest[1]
    head, foreign = (unique[i][1:-1][:9].tolist() for i in (seed, other))
    kept, run_twice = fresh(20), fresh(12)
    near = [*kept[:-1], 5]
    return [
        ("", (seed, kept, True)),
        ("too_short", (seed, fresh(9), False)),
        ("", (seed, fresh(10), True)),
        ("unfinished", (seed, [*run_twice, *run_twice], False)),
        ("repetition", (seed, [*run_twice, *run_twice], True)),
        ("copies_seed", (seed, [*head, *fresh(16)], True)),
        ("copies_corpus", (seed, [*foreign, *fresh(16)], True)),
        ("", (seed, [*head[:8], *fresh(17)], True)),
        ("", (other, near, True)),
        ("duplicate", (other, kept, True)),
    ]


@pytest.fixture(scope="module")
def filtered(inputs: dict[str, Path]) -> dict[str, Any]:
    cases = constructed(inputs)
    synthetic = make_written(inputs, inputs["directory"] / "synthetic", [row for _, row in cases])
    out = inputs["directory"] / "kept"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "Encoder", FakeEncoder)
        manifest = run(inputs, synthetic, out)
    return {"expected": [reason for reason, _ in cases], "synthetic": synthetic, "out": out, "manifest": manifest}


def test_each_reason_and_the_first_one_that_applies(filtered: dict[str, Any]) -> None:
    written, kept = Corpus(filtered["synthetic"]), Corpus(filtered["out"])
    expected: list[str] = filtered["expected"]
    passing = [i for i, reason in enumerate(expected) if not reason]
    assert kept.documents.to_pylist() == written.documents.take(passing).to_pylist()
    assert [document.tolist() for document in map(kept.__getitem__, range(len(kept)))] == [written[i].tolist() for i in passing]
    rejected = pq.read_table(filtered["out"] / REJECTED).to_pylist()
    assert [row["reason"] for row in rejected] == [reason for reason in expected if reason]
    for row, i in zip(rejected, (i for i, reason in enumerate(expected) if reason), strict=True):
        facts = written.documents.slice(i, 1).to_pylist()[0]
        assert row == {name: facts[name] for name in ("id", "seed", "sample", "tokens")} | {"reason": expected[i]}
    counts = filtered["manifest"].counts
    assert counts["rejected"] == {reason: expected.count(reason) for reason in sorted(set(expected) - {""})}
    assert (counts["documents"], counts["documents_kept"], counts["tokens_kept"]) == (10, len(kept), kept.tokens)


def runs(tokens: np.ndarray | list[int]) -> list[tuple[int, ...]]:
    return [tuple(int(token) for token in tokens[i : i + WIDTH]) for i in range(len(tokens) - WIDTH + 1)]


def test_rates_against_brute_force(inputs: dict[str, Path], filtered: dict[str, Any]) -> None:
    prepared = PreparedCorpus(inputs["corpus"])
    written, kept = Corpus(filtered["synthetic"]), Corpus(filtered["out"])
    bodies, kept_bodies, unique, heldout = (
        [corpus[i][1:-1] for i in range(len(corpus))] for corpus in (written, kept, prepared.unique, prepared.heldout)
    )
    real = set(itertools.chain.from_iterable(map(runs, unique)))

    def share(body: np.ndarray, known: set[Any]) -> float:
        found = set(runs(body))
        return len(found & known) / len(found)

    def twice(body: np.ndarray) -> bool:
        return len(set(runs(body))) < len(runs(body))

    def jaccard(a: np.ndarray, b: np.ndarray) -> float:
        return len(set(runs(a)) & set(runs(b))) / len(set(runs(a)) | set(runs(b)))

    counts = filtered["manifest"].counts
    found = counts["quality"]
    assert found["repetition"]["rate"] == np.mean([twice(body) for body in bodies])
    assert found["repetition"]["real_rate"] == np.mean([twice(body) for body in heldout])
    seeds = [set(runs(unique[seed])) for seed in written.column("seed")]
    assert found["pair_copying"]["rate"] == np.mean(
        [share(body, seed) >= 0.2 for body, seed in zip(bodies, seeds, strict=True)]
    )
    assert found["corpus_copying"]["rate"] == np.mean([share(body, real) >= 0.2 for body in bodies])
    assert found["corpus_copying"]["real_rate"] == np.mean([share(body, real) >= 0.2 for body in heldout])
    alike = [any(jaccard(a, b) >= 0.6 for j, b in enumerate(kept_bodies) if j != i) for i, a in enumerate(kept_bodies)]
    assert found["duplicates"]["rate"] == np.mean(alike) == 0.5
    novel = counts["novel_shingles"]
    assert novel["synthetic"] == pytest.approx(1 - np.mean([share(body, real) for body in kept_bodies]), abs=1e-12)
    assert novel["real_heldout"] == pytest.approx(1 - np.mean([share(body, real) for body in heldout]), abs=1e-12)
    assert found["non_factual"]["rate"] is None and "judge" in found["non_factual"]["how"]
    assert sum(counts["lengths"]["synthetic"]) == len(kept) and sum(counts["lengths"]["real"]) == len(unique)


def test_irrelevance_compares_each_kept_document_with_its_seed(inputs: dict[str, Path], filtered: dict[str, Any]) -> None:
    prepared, kept = PreparedCorpus(inputs["corpus"]), Corpus(filtered["out"])
    assert len(kept) == 4  # as many as are judged, so all are
    texts = [(prepared.text(kept, i), prepared.text(prepared.unique, int(kept.column("seed")[i]))) for i in range(4)]
    similarity = np.array([vector(text) @ vector(seed) for text, seed in texts])
    found = filtered["manifest"].counts["quality"]["pair_irrelevance"]
    assert found["rate"] == np.mean(similarity < LOW) and found["rate"] not in (0, 0.5, 1)
    assert found["mean_similarity"] == pytest.approx(similarity.mean(), abs=1e-6)
    elsewhere = [vector(texts[i][0]) @ vector(texts[i - 2][1]) for i in range(4)]
    assert found["mean_similarity_elsewhere"] == pytest.approx(np.mean(elsewhere), abs=1e-6)
    assert filtered["manifest"].flops == sum(len(text) for pair in texts for text in pair)


def test_the_interval_is_wilsons() -> None:
    found = rate(np.array([True] * 3 + [False] * 47), "how")
    share, documents, z = 0.06, 50, 1.959963984540054
    middle = (share + z**2 / (2 * documents)) / (1 + z**2 / documents)
    half = z / (1 + z**2 / documents) * np.sqrt(share * (1 - share) / documents + z**2 / (4 * documents**2))
    assert (found["rate"], found["low"], found["high"]) == pytest.approx((share, middle - half, middle + half), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_near_duplicates_against_brute_force(seed: int) -> None:
    random = np.random.default_rng(seed)
    originals = [random.integers(0, 4, random.integers(4, 40)) for _ in range(6)]
    bodies = []
    for _ in range(25):
        body = originals[random.integers(6)].copy()
        body[random.integers(len(body), size=random.integers(0, 4))] = random.integers(0, 4)
        bodies.append(body)
    sets = [{tuple(body[i : i + 3].tolist()) for i in range(len(body) - 2)} for body in bodies]
    expected = [any(5 * len(a & b) >= 3 * len(a | b) for j, b in enumerate(sets) if j != i) for i, a in enumerate(sets)]
    assert near_duplicates(bodies, 3).tolist() == expected


def test_same_letters_overlook_space_and_punctuation_alone(inputs: dict[str, Path], tmp_path: Path) -> None:
    prepared = PreparedCorpus(inputs["corpus"])
    text = prepared.text(prepared.unique, 3)
    variants = [text, text.replace(" ", ",\n  "), text + " red", text.replace("t", "d", 1)]
    rows = [(3, prepared.tokenizer.encode(variant), True) for variant in variants]
    written = Corpus(make_written(inputs, tmp_path / "synthetic", [*rows, (4, rows[0][1], True)]))
    assert same_letters(prepared, written).tolist() == [True, True, False, False, False]


def test_unfinished_documents_stay_if_asked_for(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "Encoder", FakeEncoder)
    synthetic = make_written(inputs, tmp_path / "synthetic", [(0, fresh(20), False), (0, fresh(3), False)])
    manifest = run(inputs, synthetic, tmp_path / "out", "filter.keep_unfinished=true")
    assert manifest.counts["rejected"] == {"too_short": 1}
    assert not Corpus(tmp_path / "out").column("finished")[0]


def test_a_filter_that_keeps_nothing_says_why(inputs: dict[str, Path], tmp_path: Path) -> None:
    rows = [(0, fresh(3), True), (1, fresh(20), False), (2, fresh(4), True)]
    synthetic = make_written(inputs, tmp_path / "synthetic", rows)
    with pytest.raises(UserError, match=r"no document passes the filters: 2 too_short, 1 unfinished.*tune the synthesizer"):
        run(inputs, synthetic, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_documents_of_another_corpus_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    other = {**inputs, "corpus": make_corpus(tmp_path, "seed=1")}
    synthetic = make_written(other, tmp_path / "synthetic", [(0, fresh(20), True)])
    with pytest.raises(UserError, match="was not made from"):
        run(inputs, synthetic, tmp_path / "out")
