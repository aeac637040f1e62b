"""Large files read in splits give the records of the whole, with their numbers."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbp_fast.config import CorpusConfig, RunConfig
from sbp_fast.config.files import load_config
from sbp_fast.data import input_splits
from sbp_fast.data.documents import Document, read_file
from sbp_fast.data.input_files import find_files
from sbp_fast.data.input_splits import split_files
from sbp_fast.data.preparation import SKIPPED
from sbp_fast.data.readers import InputFile, jsonl
from sbp_fast.pipeline.executors.local import LOCAL
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages.prepare import prepare

LINES = st.lists(
    st.one_of(
        st.text("ab\u00e9", min_size=1, max_size=30).map(lambda text: json.dumps({"text": text}, ensure_ascii=False)),
        st.sampled_from(["", "  ", "no JSON", "{}", "\r"]),
    ),
    max_size=20,
)


def read(files: list[InputFile]) -> list[Any]:
    items = [item for file in files for item in read_file(file, CorpusConfig())]
    return [item if isinstance(item, Document) else str(item) for item in items]


def split(path: Path | str, split_bytes: int) -> list[InputFile]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(input_splits, "SPLIT_BYTES", split_bytes)
        patch.setattr(jsonl, "COUNT_BYTES", 7)
        (parts,) = split_files(find_files(str(path)), LOCAL, 1)
    return parts


@given(lines=LINES, ending=st.sampled_from(["", "\n"]), split_bytes=st.integers(1, 60))
def test_splits_of_jsonl_read_every_line_once_with_its_number(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], ending: str, split_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "documents.jsonl"
    path.write_bytes(("\n".join([*lines, '{"text": "last"}']) + ending).encode())
    parts = split(path, split_bytes)
    assert len(parts) == -(-path.stat().st_size // split_bytes)
    assert read(parts) == read(find_files(str(path)))
    os.unlink(path)


@given(groups=st.lists(st.integers(0, 5), min_size=1, max_size=8), count=st.integers(1, 12))
def test_splits_of_parquet_read_every_row_once_with_its_number(
    tmp_path_factory: pytest.TempPathFactory, groups: list[int], count: int
) -> None:
    path = tmp_path_factory.mktemp("rows") / "documents.parquet"
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for group, rows in enumerate([*groups, 1]):
            texts = [f"row {row} of {group}" if (group + row) % 4 else "" for row in range(rows)]
            writer.write_table(pa.table({"text": texts}, schema))
    parts = split(path, -(-path.stat().st_size // count))
    assert min(count, pq.ParquetFile(path).num_row_groups) >= len(parts) > (count > 1) * (len(groups) > 1)
    assert read(parts) == read(find_files(str(path)))
    os.unlink(path)


def test_damaged_text_and_remote_files_are_read_whole(tmp_path: Path) -> None:
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1" * 100)
    (tmp_path / "letter.txt").write_text("Dear all, " * 50)
    for name, words in (("damaged.parquet", "cannot be read"), ("letter.txt", "Dear all")):
        (file,) = split(tmp_path / name, 20)
        assert file.split is None and words in str(read([file]))
    import fsspec

    fsspec.filesystem("memory").pipe("/cut/lines.jsonl", b'{"text": "a"}\n' * 50)
    assert [file.split for file in split("memory://cut/lines.jsonl", 20)] == [None]


def test_prepare_gives_the_same_corpus_for_any_split_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"text": f"Document {number}, {number**3 % 97} ..."}) for number in range(300)]
    lines[100:100] = ["no JSON", "", lines[7], lines[290]]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines))
    made = []
    for split_bytes, workers in ((1 << 28, 1), (700, 2)):
        monkeypatch.setattr(input_splits, "SPLIT_BYTES", split_bytes)
        corpus = {"path": str(tmp_path / "documents.jsonl"), "vocabulary_size": 270, "unique_share": 0.5, "workers": workers}
        config = RunConfig.model_validate({"corpus": {**corpus, "on_error": "skip"}})
        made.append(prepare(config, tmp_path / str(split_bytes), console=Console(quiet=True)))
    assert made[0].files == made[1].files and made[0].fingerprint == made[1].fingerprint
    assert made[0].counts == made[1].counts and made[0].counts["records_skipped"] == 1
    assert "line 101" in (tmp_path / "700/skipped.jsonl").read_text()


def test_small_files_read_in_groups_give_the_corpus_of_single_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(f"The letter of day {number} says little." * (number % 4))
    (folder / "many.txt").write_text("A longer letter. " * 30)
    config = load_config(
        ["small"], [f"corpus.path='{folder}'", "corpus.on_error=skip", "corpus.vocabulary_size=300", "corpus.unique_share=1"]
    )
    manifests, groups = [], []
    for size in (0, 300, input_splits.GROUP_BYTES):
        monkeypatch.setattr(input_splits, "GROUP_BYTES", size)
        groups.append(len(input_splits.group_files(find_files(str(folder)))))
        manifests.append(prepare(config, tmp_path / str(size), console=Console(quiet=True)))
    assert groups[0] > 30 and groups[0] > groups[1] > groups[2] == 1
    assert manifests[0].files == manifests[1].files == manifests[2].files
    assert manifests[0].counts == manifests[1].counts == manifests[2].counts
    assert len((tmp_path / "0" / SKIPPED).read_text().splitlines()) == 10
