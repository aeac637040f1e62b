"""Near-duplicates: what MinHash estimates, what is found against comparing everything with everything, what `prepare` does."""

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbp_fast.config import CorpusConfig, RunConfig
from sbp_fast.data import preparation
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.dedup.minhash import BANDS, ROWS, SHINGLE_WORDS, band_keys, jaccard, word_ids
from sbp_fast.dedup.shingles import shingle_hashes, signature, window_hashes
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages.prepare import prepare

QUIET = Console(quiet=True)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+|[^\x00-\x7f]", "".join(c.lower() if c.isascii() else c for c in text))


def ids(text: str) -> list[int]:
    return word_ids(np.frombuffer(text.encode(), np.uint8)).tolist()


@given(texts=st.lists(st.text(st.sampled_from("aAb1 .éß文字𝄞\n-"), max_size=30), min_size=1, max_size=5))
def test_words_have_one_id_each(texts: list[str]) -> None:
    known: dict[str, int] = {}
    for text in texts:
        found = ids(text)
        assert len(found) == len(words(text))
        for word, id in zip(words(text), found, strict=True):
            assert known.setdefault(word, id) == id
    assert len(set(known.values())) == len(known)


def test_signature_agreement_estimates_the_jaccard_similarity() -> None:
    generator = np.random.default_rng(0)
    errors = []
    for size in (3, 30, 300, 3000):
        for share in np.linspace(0, 1, 30):
            pool = generator.integers(0, 1 << 63, 2 * size, dtype=np.uint64)
            first, second = pool[:size], np.concatenate([pool[: int(size * share)], pool[size : 2 * size - int(size * share)]])
            exact = jaccard(np.unique(first), np.unique(second))
            assert exact == len(set(first.tolist()) & set(second.tolist())) / len(set(first.tolist()) | set(second.tolist()))
            errors.append(np.mean(signature(first, 128) == signature(second, 128)) - exact)
    assert np.abs(errors).mean() < 0.04 and abs(np.mean(errors)) < 0.02


def test_similar_texts_share_a_band_with_the_stated_probability() -> None:
    generator = np.random.default_rng(0)
    shared = 0
    for _ in range(300):
        pool = generator.integers(0, 1 << 63, 1100, dtype=np.uint64)
        least = [signature(part, BANDS * ROWS).reshape(BANDS, ROWS) for part in (pool[:1000], pool[100:])]  # 900 of 1100
        shared += bool((least[0] == least[1]).all(1).any())
    assert shared >= 296  # 99.9% at 0.818


def test_band_keys_of_many_texts_equal_those_of_each() -> None:
    texts = ["One two three four five six seven.", "", "...", "short", "One two three four five six seven!"]
    encoded = [text.encode() for text in texts]
    keys, lengths = band_keys(
        np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([0, *map(len, encoded)]), SHINGLE_WORDS, BANDS, ROWS
    )
    assert lengths.tolist() == [len(words(text)) for text in texts] == [7, 0, 0, 1, 7]
    assert (keys[:, 0] == keys[:, 4]).all() and (keys[:, 0] != keys[:, 3]).all() and keys.shape == (BANDS, 5)


def test_band_keys_agree_exactly_where_signatures_do() -> None:
    texts = [[f"w{(i * i + (i % 60 == 0) * step * 7) % 997}" for i in range(300)] for step in range(6)]
    encoded = [" ".join(text).encode() for text in texts]
    keys, _ = band_keys(
        np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([0, *map(len, encoded)]), SHINGLE_WORDS, BANDS, ROWS
    )
    least = [signature(window_hashes(word_ids(np.frombuffer(text, np.uint8)), SHINGLE_WORDS), BANDS * ROWS) for text in encoded]
    agree = [(least[0].reshape(BANDS, ROWS) == one.reshape(BANDS, ROWS)).all(1) for one in least]
    assert [(keys[:, 0] == keys[:, i]).tolist() for i in range(6)] == [one.tolist() for one in agree]
    assert 0 < np.sum(agree[1:]) < 5 * BANDS


def make(folder: Path, count: int = 60) -> dict[str, str]:
    """Documents of 120 words; every third has variants in which 1, 3 and 40 words differ."""
    generator = np.random.default_rng(0)
    texts: dict[str, str] = {}
    for number in range(count):
        original = [f"w{word}" for word in generator.integers(0, 5000, 120)]
        texts[f"{number}"] = " ".join(original)
        for changed in (1, 3, 40) if number % 3 == 0 else ():
            variant = list(original)
            for position in generator.choice(120, changed, replace=False):
                variant[position] = f"new{position}"
            texts[f"{number}-{changed}"] = " ".join(variant)
    lines = [json.dumps({"id": id, "text": text}) + "\n" for id, text in texts.items()]
    folder.mkdir()
    for part in range(2):
        (folder / f"{part}.jsonl").write_text("".join(lines[part::2]))
    return texts


def run(folder: Path, out: Path, **corpus: Any) -> PreparedCorpus:
    values = {"path": str(folder), "vocabulary_size": 300, "unique_share": 0.5, "deduplicate": "near", **corpus}
    prepare(RunConfig(corpus=CorpusConfig(**values)), out, console=QUIET)
    return PreparedCorpus(out)


@cache
def shingles(text: str) -> frozenset[tuple[str, ...]]:
    found = words(text)
    return frozenset(tuple(found[i : i + 5]) for i in range(max(1, len(found) - 4)))


def similarity(first: str, second: str) -> float:
    return len(shingles(first) & shingles(second)) / len(shingles(first) | shingles(second))


def groups(texts: dict[str, str], least: float) -> list[set[str]]:
    """Documents that are alike, directly or through others, by comparing all with all."""
    found: list[set[str]] = []
    for id, text in texts.items():
        alike = [group for group in found if any(similarity(text, texts[other]) >= least for other in group)]
        found = [group for group in found if group not in alike] + [{id}.union(*alike)]
    return found


@pytest.mark.parametrize("least", [0.75, 0.9])
def test_deduplicate_near_finds_the_clusters_of_an_all_pairs_comparison(tmp_path: Path, least: float) -> None:
    texts = make(tmp_path / "documents")
    corpus = run(tmp_path / "documents", tmp_path / "out", near_duplicate_similarity=least, heldout_share=0.05)
    stay = [*corpus.train.ids, *corpus.heldout.ids]
    expected = groups(texts, least)
    assert len(stay) == len(expected) < len(texts) and all(len(group & set(stay)) == 1 for group in expected)
    assert corpus.counts["near_duplicates_dropped"] == len(texts) - len(stay)
    listed = pq.read_table(tmp_path / "out/near-duplicates.parquet").to_pylist()
    assert {row["id"] for row in listed} == texts.keys() - set(stay) and {row["kept"] for row in listed} <= set(stay)
    assert all(row["similarity"] == pytest.approx(similarity(texts[row["id"]], texts[row["kept"]])) for row in listed)
    first = [id for id in stay if id in corpus.train.ids and "-" in id and int(id.split("-")[1]) < 40]
    reading = {id: (number % 2, number) for number, id in enumerate(texts)}
    for id in first:  # a variant stays only if it was read before the others of its cluster
        assert reading[id] == min(reading[one] for one in next(group for group in expected if id in group))


def test_a_near_duplicate_of_a_heldout_document_is_not_trained_on(tmp_path: Path) -> None:
    texts = make(tmp_path / "documents")
    heldout = tmp_path / "heldout.jsonl"
    near = {"h0": texts["0"].replace("w", "W", 1) + " end", "h1": texts["1"] + " end"}
    held = {**near, "h2": "nothing like the others " * 9, "h3": "like nothing else there is " * 9}
    heldout.write_text("".join(json.dumps({"id": id, "text": text}) + "\n" for id, text in held.items()))
    corpus = run(tmp_path / "documents", tmp_path / "out", heldout=str(heldout))
    assert sorted(corpus.heldout.ids) == sorted(held)
    assert not {"0", "0-1", "0-3", "1"} & set(corpus.train.ids)


def test_near_duplicates_do_not_depend_on_partitions_and_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "documents")
    whole = run(tmp_path / "documents", tmp_path / "whole", workers=1)
    monkeypatch.setattr(preparation, "PARTITION_BYTES", 20_000)
    cut = [run(tmp_path / "documents", tmp_path / str(workers), workers=workers) for workers in (1, 2)]
    assert Manifest.load(tmp_path / "1").files == Manifest.load(tmp_path / "2").files
    assert cut[0].counts == whole.counts and list(cut[0].train.ids) == list(whole.train.ids)
    assert len(list((tmp_path / "1/train").glob("tokens*"))) > 1


def test_without_near_duplicates_nothing_is_dropped(tmp_path: Path) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    texts = [f"{number} " * (number % 9 + 1) + f"{number**2} {number**3}" for number in range(200)] + ["...", "!!!"]
    (folder / "0.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = run(folder, tmp_path / "out")
    assert len(corpus.train) + len(corpus.heldout) == len(texts) and corpus.counts["near_duplicates_dropped"] == 0
    assert pq.read_table(tmp_path / "out/near-duplicates.parquet").num_rows == 0


def test_word_shingles_use_the_hashes_of_token_shingles(tmp_path: Path) -> None:
    text: Sequence[int] = ids("the one place where shingles are hashed")
    assert len(shingle_hashes(np.array(text), SHINGLE_WORDS)) == 3
