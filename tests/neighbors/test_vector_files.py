"""Vectors made elsewhere: what the stage `embed` makes of files of them, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sbp_fast.config import RunConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.neighbors import vector_files
from sbp_fast.neighbors.query import find_neighbors
from sbp_fast.neighbors.vectors import Split, Vectors
from sbp_fast.pairs.pairset import PairSet
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages.embed import embed
from sbp_fast.stages.pair import pair
from sbp_fast.stages.prepare import prepare

QUIET = Console(quiet=True)
TOPICS, WORDS = 10, ["harbour", "kitchen", "court", "tennis", "comet", "orchard", "ballad", "glacier", "market", "violin"]
SPLITS: tuple[Split, ...] = ("unique", "heldout")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unique documents u-0 to u-39, held-out documents h-0 to h-19; document n is about topic n mod 10."""
    folder = tmp_path_factory.mktemp("corpus")
    for letter, count in (("u", 40), ("h", 20)):
        records = [{"id": f"{letter}-{n}", "text": f"{WORDS[n % TOPICS]} {letter}{n} {n * 37}"} for n in range(count)]
        (folder / f"{letter}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    files = {"path": str(folder / "u.jsonl"), "heldout": str(folder / "h.jsonl")}
    settings = {"vocabulary_size": 300, "unique_share": 1.0, **files}
    prepare(RunConfig.model_validate({"threads": 1, "corpus": settings}), folder / "prepared", console=QUIET)
    return folder / "prepared"


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    """Vectors of any length by id, in an order of their own; those of one topic are near; x-0 is no document."""
    generator = np.random.default_rng(0)
    topics = generator.normal(size=(TOPICS, 8))
    ids = [f"{letter}-{n}" for letter, count in (("u", 40), ("h", 20)) for n in range(count)]
    known = {id: topics[int(id[2:]) % TOPICS] + 0.2 * generator.normal(size=8) for id in ids} | {"x-0": np.ones(8)}
    return {
        id: (known[id] * generator.uniform(0.5, 9)).astype(np.float32) for id in generator.permutation(list(known)).tolist()
    }


def write_array(path: Path, vectors: dict[str, np.ndarray]) -> str:
    np.save(path, np.stack([*vectors.values()]))
    path.with_suffix(".ids.txt").write_text("".join(f"{id}\n" for id in vectors))
    return str(path)


def write_lines(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def as_records(vectors: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    return [{"id": id, "vector": vector.tolist()} for id, vector in vectors.items()]


def write(folder: Path, kind: str, vectors: dict[str, np.ndarray]) -> str | tuple[str, ...]:
    """Write vectors as a file of some kind, or as two."""
    if kind == "npy":
        return write_array(folder / "vectors.npy", vectors)
    if kind == "two npy":
        items = list(vectors.items())
        for number, part in enumerate((items[:7], items[7:])):
            write_array(folder / f"vectors-{number}.npy", dict(part))
        return str(folder / "vectors-*.npy")
    if kind == "jsonl":
        return write_lines(folder / "vectors.jsonl", as_records(vectors))
    pq.write_table(pa.Table.from_pylist(as_records(vectors)), folder / "vectors.parquet")
    return str(folder / "vectors.parquet")


def run(corpus: Path, file: str | tuple[str, ...], out: Path, **settings: Any) -> Manifest:
    values = {"file": file, "storage": "float32", "shard_documents": 16, **settings}
    return embed(RunConfig.model_validate({"embed": values}), corpus, out, console=QUIET)


@pytest.mark.parametrize("kind", ["npy", "two npy", "jsonl", "parquet"])
def test_vectors_of_a_file_become_unit_vectors_in_the_order_of_the_corpus(
    kind: str, corpus: Path, vectors: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_files, "BATCH", 5)
    manifest = run(corpus, write(tmp_path, kind, vectors), tmp_path / "out")
    for split, count in zip(SPLITS, (40, 20), strict=True):
        ids = getattr(PreparedCorpus(corpus), split).ids
        expected = np.stack([vectors[id] / np.linalg.norm(vectors[id]) for id in ids])
        joined = Vectors(tmp_path / "out", split=split)
        assert len(joined) == count and np.abs(joined[np.arange(count)] - expected).max() < 1e-6
    assert manifest.counts == {
        "model": "embed.file",
        "storage": "float32",
        "documents": 40,
        "dimension": 8,
        "extra": 1,
        "heldout": {"documents": 20},
    }
    assert not [*(tmp_path / "out").rglob("*.float32")]
    stored = np.load(tmp_path / "out" / "vectors-00000.npy")
    assert np.abs(np.linalg.norm(stored, axis=1) - 1).max() < 1e-6


def test_vectors_are_the_same_in_every_order_and_batch_size(
    corpus: Path, vectors: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(corpus, write(tmp_path, "npy", vectors), tmp_path / "first")
    monkeypatch.setattr(vector_files, "BATCH", 3)
    second = run(corpus, write(tmp_path, "parquet", dict(reversed(vectors.items()))), tmp_path / "second")
    assert first.files == second.files and first.counts == second.counts


def test_extra_vectors_are_counted_in_a_line(
    corpus: Path, vectors: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = RunConfig.model_validate({"embed": {"file": write(tmp_path, "npy", vectors)}})
    embed(config, corpus, tmp_path / "out", console=Console())
    assert "1 vectors left out: of documents that are neither unique nor held out" in capsys.readouterr().out


def test_dimensions_keeps_the_first_components(corpus: Path, vectors: dict[str, np.ndarray], tmp_path: Path) -> None:
    file = write(tmp_path, "npy", vectors)
    run(corpus, file, tmp_path / "out", dimensions=3)
    head = vectors[PreparedCorpus(corpus).unique.ids[0]][:3]
    assert np.abs(Vectors(tmp_path / "out")[np.array([0])][0] - head / np.linalg.norm(head)).max() < 1e-6
    with pytest.raises(UserError, match=r"embed.dimensions = 9: its vectors have 8 components"):
        run(corpus, file, tmp_path / "long", dimensions=9)


def test_a_killed_import_resumes_to_the_same_output(
    corpus: Path, vectors: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sbp_fast.neighbors import imported

    file, write_vectors, calls = write(tmp_path, "npy", vectors), imported.write_vectors, []

    def write_then_die(*arguments: Any) -> None:
        calls.append(arguments[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        write_vectors(*arguments)

    monkeypatch.setattr(imported, "write_vectors", write_then_die)
    with pytest.raises(KeyboardInterrupt):
        run(corpus, file, tmp_path / "out")
    resumed = run(corpus, file, tmp_path / "out")
    assert len(calls) == 6  # 3 shards of unique documents and 2 of held-out ones, one of them begun twice
    assert resumed.files == run(corpus, file, tmp_path / "again").files


def test_changed_vectors_are_refused_without_force(corpus: Path, vectors: dict[str, np.ndarray], tmp_path: Path) -> None:
    run(corpus, write(tmp_path, "npy", vectors), tmp_path / "out")
    with pytest.raises(UserError, match="input vectors changed"):
        run(corpus, write(tmp_path, "npy", vectors | {"u-1": np.ones(8, np.float32)}), tmp_path / "out")


def test_pairs_and_neighbors_are_found_among_vectors_of_a_file(
    corpus: Path, vectors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    run(corpus, write(tmp_path, "parquet", vectors), tmp_path / "vectors")
    settings = {"similarity_low": 0.8, "neighbors": 3, "save_index": True, "near_duplicate_containment": 1.0}
    config = RunConfig.model_validate({"threads": 1, "device": "cpu", "pair": settings})
    pair(config, corpus, tmp_path / "vectors", tmp_path / "pairs", console=QUIET)
    pairs, ids = PairSet(tmp_path / "pairs"), PreparedCorpus(corpus).unique.ids
    assert len(pairs.seeds) == 120  # each of 40 with the three others of its topic
    assert all(int(ids[a][2:]) % TOPICS == int(ids[b][2:]) % TOPICS for a, b in zip(pairs.seeds, pairs.partners, strict=True))
    options: dict[str, Any] = {"corpora": [corpus], "vectors": [tmp_path / "vectors"], "count": 3}
    nearest = find_neighbors(config, tmp_path / "pairs", document="u-7", **options)
    assert sorted(neighbor.id for neighbor in nearest) == ["u-17", "u-27", "u-37"]
    with pytest.raises(UserError, match="vectors of a file, which no text can be compared with; give --document"):
        find_neighbors(config, tmp_path / "pairs", text="a harbour", **options)
    assert Manifest.load(tmp_path / "pairs").counts["encoder"] == "embed.file"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u-1": [0.0] * 8}, r"vectors.jsonl, line \d+, document 'u-1': its vector has the length 0; correct the vector"),
        ({"u-1": [1e200] * 8}, r"document 'u-1': its vector has the length inf"),
        ({"u-1": [1.0, float("nan")] * 4}, r"line \d+: .*NaN is no finite number"),
        ({"u-1": [1.0] * 7}, r"line \d+: a vector of 7 numbers, where that of .*vectors.jsonl, line 1 has 8"),
        ({"u-1": [1.0, None] * 4}, r"line \d+: its vector is no list of numbers; give JSON lines or Parquet"),
        ({"u-1": [[1.0] * 8]}, "no list of numbers"),
        ({"u-1": ["1"] * 8}, "no list of numbers"),
        ({"u-1": "1 2 3"}, "no list of numbers"),
        ({"u-1": []}, "no list of numbers"),
        ({"": [1.0] * 8}, "a vector without an id"),
        ({"u-1": None}, "no list of numbers"),
    ],
)
def test_a_vector_that_cannot_be_used_is_refused_by_file_and_line(
    changes: dict[str, Any], message: str, corpus: Path, vectors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    values = {id: vector.tolist() for id, vector in vectors.items()} | changes
    records = [{"id": id, "vector": value} for id, value in values.items()]
    with pytest.raises(UserError, match=message):
        run(corpus, write_lines(tmp_path / "vectors.jsonl", records), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("batch", [4096, 1])
def test_a_second_vector_of_a_document_is_refused(
    batch: int, corpus: Path, vectors: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_files, "BATCH", batch)
    records = [*as_records(vectors), {"id": "h-3", "vector": [1.0] * 8}]
    with pytest.raises(UserError, match="line 62: a second vector of the document 'h-3'"):
        run(corpus, write_lines(tmp_path / "vectors.jsonl", records), tmp_path / "out")


def test_documents_without_a_vector_are_counted_and_named(corpus: Path, vectors: dict[str, np.ndarray], tmp_path: Path) -> None:
    fewer = {id: vector for id, vector in vectors.items() if id not in ("u-4", "h-5")}
    with pytest.raises(UserError, match=r"embed.file: has no vector for 2 of 60 documents: u-4, h-5; give one for each"):
        run(corpus, write(tmp_path, "npy", fewer), tmp_path / "out")


def test_arrays_that_cannot_be_used_are_refused(corpus: Path, vectors: dict[str, np.ndarray], tmp_path: Path) -> None:
    def refuses(message: str) -> None:
        with pytest.raises(UserError, match=message):
            run(corpus, str(tmp_path / "vectors.npy"), tmp_path / "out")

    refuses("no such file; give JSON lines or Parquet")
    write_array(tmp_path / "vectors.npy", vectors)
    ids = tmp_path / "vectors.ids.txt"
    ids.write_text(ids.read_text() + "y-0\n")
    refuses("holds 61 vectors, and vectors.ids.txt 62 ids")
    np.save(tmp_path / "vectors.npy", np.zeros(62))
    refuses(r"is an array of float64 of shape \[62\], not of numbers")
    np.save(tmp_path / "vectors.npy", np.full((62, 2), "1"))
    refuses("is an array of <U1")
    (tmp_path / "vectors.npy").write_bytes(b"no array")
    refuses("is no numpy array")
    ids.unlink()
    refuses("vectors.ids.txt is missing; write them there, one a line")
