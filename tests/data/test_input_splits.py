"""Large files read in spans give the records of the whole, with their numbers."""

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
from sbp_fast.data import input_splits as cutting
from sbp_fast.data.documents import Document, File, find_files, read_file
from sbp_fast.data.input_splits import cut_files
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


def read(files: list[File]) -> list[Any]:
    items = [item for file in files for item in read_file(file, CorpusConfig())]
    return [item if isinstance(item, Document) else str(item) for item in items]


def spans(path: Path, span_bytes: int) -> list[File]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "SPAN_BYTES", span_bytes)
        patch.setattr(cutting, "COUNTED_AT_ONCE", 7)
        (found,) = cut_files(find_files(str(path)), LOCAL, 1)
    return found


@given(lines=LINES, ending=st.sampled_from(["", "\n"]), span_bytes=st.integers(1, 60))
def test_every_line_is_read_once_under_its_number(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], ending: str, span_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "documents.jsonl"
    path.write_bytes(("\n".join([*lines, '{"text": "last"}']) + ending).encode())
    found = spans(path, span_bytes)
    assert len(found) == -(-path.stat().st_size // span_bytes)
    assert read(found) == read(find_files(str(path)))
    os.unlink(path)


@given(groups=st.lists(st.integers(0, 5), min_size=1, max_size=8), count=st.integers(1, 12))
def test_every_row_is_read_once_under_its_number(
    tmp_path_factory: pytest.TempPathFactory, groups: list[int], count: int
) -> None:
    path = tmp_path_factory.mktemp("rows") / "documents.parquet"
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for group, rows in enumerate([*groups, 1]):
            texts = [f"row {row} of {group}" if (group + row) % 4 else "" for row in range(rows)]
            writer.write_table(pa.table({"text": texts}, schema))
    found = spans(path, -(-path.stat().st_size // count))
    assert min(count, pq.ParquetFile(path).num_row_groups) >= len(found) > (count > 1) * (len(groups) > 1)
    assert read(found) == read(find_files(str(path)))
    os.unlink(path)


def test_what_cannot_be_cut_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1" * 100)
    (tmp_path / "letter.txt").write_text("Dear all, " * 50)
    for name, words in (("damaged.parquet", "cannot be read"), ("letter.txt", "Dear all")):
        (found,) = spans(tmp_path / name, 20)
        assert found.span is None and words in str(read([found]))
    import fsspec

    fsspec.filesystem("memory").pipe("/cut/lines.jsonl", b'{"text": "a"}\n' * 50)
    assert [file.span for file in spans("memory://cut/lines.jsonl", 20)] == [None]  # type: ignore[arg-type]


def test_a_corpus_is_the_same_however_its_files_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"text": f"Document {number}, {number**3 % 97} ..."}) for number in range(300)]
    lines[100:100] = ["no JSON", "", lines[7], lines[290]]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines))
    made = []
    for span_bytes, workers in ((1 << 28, 1), (700, 2)):
        monkeypatch.setattr(cutting, "SPAN_BYTES", span_bytes)
        corpus = {"path": str(tmp_path / "documents.jsonl"), "vocabulary_size": 270, "unique_share": 0.5, "workers": workers}
        config = RunConfig.model_validate({"corpus": {**corpus, "on_error": "skip"}})
        made.append(prepare(config, tmp_path / str(span_bytes), console=Console(quiet=True)))
    assert made[0].files == made[1].files and made[0].fingerprint == made[1].fingerprint
    assert made[0].counts == made[1].counts and made[0].counts["records_skipped"] == 1
    assert "line 101" in (tmp_path / "700/skipped.jsonl").read_text()
