"""Known pairs in a file: what they become, and what is refused."""

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
from sbp_fast.pairs.heldout_pairs import HeldoutPairs
from sbp_fast.pairs.pairset import PairSet
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages.pair import pair
from sbp_fast.stages.prepare import prepare

QUIET = Console(quiet=True)


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unique documents u-0 to u-39, documents for the oracle o-0 to o-19, held-out documents h-0/0 to h-9/3 and u-0."""
    folder = tmp_path_factory.mktemp("corpus")
    ids = {"unique": [f"u-{n}" for n in range(40)], "path": [f"o-{n}" for n in range(20)]}
    ids["heldout"] = [*(f"h-{n // 4}/{n % 4}" for n in range(40)), "u-0"]
    files = {
        name: str(write_lines(folder / f"{name}.jsonl", [{"id": id, "text": f"Dear {id}, a letter."} for id in listed]))
        for name, listed in ids.items()
    }
    settings = {"vocabulary_size": 300, "deduplicate": "none", "group_separator": "/", **files}
    prepare(RunConfig.model_validate({"threads": 1, "corpus": settings}), folder / "prepared", console=QUIET)
    return folder / "prepared"


def run(corpus: Path, file: Path, out: Path, **options: Any) -> Manifest:
    config = RunConfig.model_validate({"pair": {"file": str(file)}})
    return pair(config, corpus, options.pop("vectors", None), out, console=QUIET, **options)


def test_pairs_of_a_file_become_the_pairs_of_the_stage(corpus: Path, tmp_path: Path) -> None:
    records = [
        {"seed": "u-3", "partner": "u-1"},
        {"seed": "u-2", "partner": "u-9", "similarity": 0.25},
        {"seed": "u-2", "partner": "u-3", "similarity": 0.5},
        {"seed": "u-2", "partner": "u-9", "similarity": 0.75},
    ]
    manifest = run(corpus, write_lines(tmp_path / "pairs.jsonl", records), tmp_path / "out")
    pairs, ids = PairSet(tmp_path / "out"), PreparedCorpus(corpus).unique.ids
    named = [
        (ids[seed], ids[partner], score) for seed, partner, score in zip(pairs.seeds, pairs.partners, pairs.scores, strict=True)
    ]
    assert sorted(named) == [("u-2", "u-3", 0.5), ("u-2", "u-9", 0.75), ("u-3", "u-1", 1.0)]
    assert [name[:2] for name in named if name[0] == "u-2"] == [("u-2", "u-9"), ("u-2", "u-3")]  # by falling similarity
    assert (np.diff(pairs.seeds) >= 0).all()
    assert {key: manifest.counts[key] for key in ("pairs", "seeds", "repeated")} == {"pairs": 3, "seeds": 2, "repeated": 1}
    assert len(HeldoutPairs.load(tmp_path / "out")) == 0


def test_the_same_pairs_in_parquet_give_the_same_output(corpus: Path, tmp_path: Path) -> None:
    records = [{"seed": f"u-{n}", "partner": f"u-{n + 1}"} for n in range(1, 30)]
    first = run(corpus, write_lines(tmp_path / "pairs.jsonl", records), tmp_path / "first")
    pq.write_table(pa.Table.from_pylist(records[::-1]), tmp_path / "pairs.parquet")
    second = run(corpus, tmp_path / "pairs.parquet", tmp_path / "second")
    tables = [pq.read_table(tmp_path / name / "pairs.parquet") for name in ("first", "second")]
    assert tables[0].equals(tables[1]) and first.counts == second.counts


def test_heldout_pairs_are_measured_within_their_split_beside_another_seed(corpus: Path, tmp_path: Path) -> None:
    heldout = [f"h-{n // 4}/{n % 4}" for n in range(40)]
    related = [(a, b) for a in heldout for b in heldout if a != b and a.split("/")[0] == b.split("/")[0]]
    records = [{"seed": "u-1", "partner": "u-2"}, *({"seed": a, "partner": b} for a, b in related)]
    manifest = run(corpus, write_lines(tmp_path / "pairs.jsonl", records), tmp_path / "out")
    pairs, prepared = HeldoutPairs.load(tmp_path / "out"), PreparedCorpus(corpus)
    ids = prepared.heldout.ids
    assert sorted((ids[seed], ids[partner]) for seed, partner in zip(pairs.seeds, pairs.partners, strict=True)) == sorted(
        related
    )
    for seed, partner, other, split in zip(pairs.seeds, pairs.partners, pairs.other_seeds, pairs.splits, strict=True):
        assert {seed, partner, other} <= set(getattr(prepared, split).tolist())
        assert ids[other].split("/")[0] != ids[partner].split("/")[0]
    assert manifest.counts["heldout"]["across_splits"] == 0


GOOD = {"seed": "u-1", "partner": "u-2"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"seed": "u-1", "partner": "u-77"}, "has the id 'u-77'"),
        ({"seed": "o-1", "partner": "u-1"}, "has the id 'o-1'"),
        ({"seed": "u-1", "partner": "h-0/0"}, "held-out document 'h-0/0' with the unique document 'u-1'"),
        ({"seed": "u-0", "partner": "u-1"}, "a unique and a held-out document have the id 'u-0'"),
        ({"seed": "u-1", "partner": "u-1"}, "'u-1' with itself; remove it"),
        ({"seed": "u-1"}, "without a partner"),
        ({"partner": "u-1"}, "without a seed"),
        ({**GOOD, "similarity": "high"}, "no number: 'high'"),
        ({**GOOD, "similarity": float("nan")}, "NaN is no finite number"),
        (["u-1", "u-2"], "line 2"),
    ],
)
def test_a_record_that_is_no_pair_is_refused_by_file_and_line(
    corpus: Path, tmp_path: Path, record: object, message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        run(corpus, write_lines(tmp_path / "pairs.jsonl", [GOOD, record]), tmp_path / "out")
    assert str(refused.value).startswith(f"{tmp_path}/pairs.jsonl, line 2")
    assert not (tmp_path / "out").exists()


def test_a_file_without_pairs_of_unique_documents_is_refused(corpus: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "pairs.jsonl", [{"seed": "h-0/0", "partner": "h-0/1"}])
    with pytest.raises(UserError, match="no pair of unique documents"):
        run(corpus, file, tmp_path / "out")


def test_a_parquet_file_without_a_column_of_partners_is_refused(corpus: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"seed": ["u-1"], "target": ["u-2"]}), tmp_path / "pairs.parquet")
    with pytest.raises(UserError, match=r"no column 'partner'.*seed and partner"):
        run(corpus, tmp_path / "pairs.parquet", tmp_path / "out")


def test_vectors_and_known_pairs_exclude_each_other(corpus: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "pairs.jsonl", [GOOD])
    with pytest.raises(UserError, match="vectors"):
        run(corpus, file, tmp_path / "out", vectors=tmp_path)
    with pytest.raises(UserError, match="needs --vectors"):
        pair(RunConfig(), corpus, None, tmp_path / "out", console=QUIET)


def test_changed_pairs_are_refused_without_force(corpus: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "pairs.jsonl", [GOOD])
    run(corpus, file, tmp_path / "out")
    write_lines(file, [{"seed": "u-2", "partner": "u-1"}])
    with pytest.raises(UserError, match="pairs"):
        run(corpus, file, tmp_path / "out")
    run(corpus, file, tmp_path / "out", force=True)
