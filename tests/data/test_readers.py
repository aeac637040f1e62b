import gzip
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from sbp_fast.config import CorpusConfig, RunConfig
from sbp_fast.data.documents import Document, group_of, read_file
from sbp_fast.data.input_files import find_files, fingerprint_sources
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.readers import READERS, Fields, InputFile, InputSplit, Reader, Record, find_reader, register_reader
from sbp_fast.errors import UserError
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages.prepare import prepare

RECORDS = [
    {"id": "a/1", "text": "First.", "source": "letters"},
    {"id": "a/2", "text": "Zweite: äöü 𝄞.", "source": "letters"},
    {"id": "b", "text": "Third."},
]
EXPECTED = [("a/1", "First.", "letters"), ("a/2", "Zweite: äöü 𝄞.", "letters"), ("b", "Third.", "text")]


def jsonl(records: list) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


class ParagraphReader(Reader):
    """A format of the test's own: a record is a line `id: text`; a split is a range of lines."""

    suffixes = (".paragraphs",)
    record_name = "paragraph"

    def read(self, file: InputFile, fields: Fields) -> Iterator[Record | UserError]:
        with file.open() as stream:
            lines = stream.read().decode().splitlines()
        split = file.split or InputSplit(0, len(lines))
        for number in range(split.start, split.stop):
            id, separator, text = lines[number].partition(": ")
            if separator:
                yield Record({fields.id: id, fields.text: text}, number + 1)
            else:
                yield UserError(f"{file.shown}, paragraph {number + 1}", "no id", "write it as `id: text`")

    def split(self, file: InputFile, count: int) -> list[InputSplit]:
        with file.open() as stream:
            lines = len(stream.read().splitlines())
        edges = [lines * index // count for index in range(count + 1)]
        return [InputSplit(start, stop, start) for start, stop in pairwise(edges)]


@pytest.fixture
def paragraphs() -> Iterator[None]:
    register_reader(ParagraphReader())
    yield
    READERS.unregister(".paragraphs")


def items(path: Path | str | tuple[str, ...], **settings: object) -> list[Document | UserError]:
    path = str(path) if isinstance(path, Path) else path
    config = CorpusConfig(path=path, **settings)
    return [item for file in find_files(path) for item in read_file(file, config)]


def read(path: Path | str | tuple[str, ...], **settings: object) -> list[Document]:
    documents = []
    for item in items(path, **settings):
        if isinstance(item, UserError):
            raise item
        documents.append(item)
    return documents


def described(documents: list[Document]) -> list[tuple[str, str, str]]:
    return [(document.id, document.text, document.source) for document in documents]


def refusal(path: Path | str | tuple[str, ...], **settings: object) -> str:
    with pytest.raises(UserError) as caught:
        read(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_parquet(path: Path, **columns: list) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


ENCODINGS = {
    "c.jsonl": lambda data: data,
    "c.jsonl.gz": lambda data: gzip.compress(data[:40]) + gzip.compress(data[40:]),
    "c.jsonl.zst": lambda data: zstandard.compress(data[:40]) + zstandard.compress(data[40:]),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_jsonl_plain_gzip_and_zstd_of_several_members_give_the_same_documents(tmp_path: Path, name: str) -> None:
    assert described(read(write(tmp_path / name, ENCODINGS[name](jsonl(RECORDS))))) == EXPECTED


def test_parquet_gives_its_rows_and_names_them(tmp_path: Path) -> None:
    columns = {key: [record.get(key) for record in RECORDS] for key in ("id", "text", "source")}
    documents = read(write_parquet(tmp_path / "c.parquet", **columns, other=[1, 2, 3]))
    assert described(documents) == EXPECTED
    assert documents[2].where.endswith("c.parquet, row 3")


def test_jsonl_with_blank_lines_a_byte_order_mark_and_windows_line_ends_is_read(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + jsonl(RECORDS).replace(b"\n", b"\r\n\r\n")
    documents = read(write(tmp_path / "c.jsonl", content))
    assert described(documents) == EXPECTED
    assert documents[2].where.endswith("c.jsonl, line 5")


def test_configured_fields_and_numeric_ids_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", jsonl([{"key": 7, "body": "Text.", "kind": "note"}]))
    assert described(read(path, text_field="body", id_field="key", source_field="kind")) == [("7", "Text.", "note")]


def test_a_folder_is_read_recursively_in_sorted_order_and_names_stand_in_for_ids(tmp_path: Path) -> None:
    write(tmp_path / "b/z.jsonl", jsonl([{"text": "last\n"}]))
    write(tmp_path / "b/a.jsonl", jsonl([{"text": "third"}]))
    write(tmp_path / "a.jsonl", jsonl([{"text": "first"}, {"text": "second"}]))
    documents = read(tmp_path)
    assert [document.id for document in documents] == ["a.jsonl:1", "a.jsonl:2", "b:a.jsonl:1", "b:z.jsonl:1"]
    assert [document.text for document in documents] == ["first", "second", "third", "last\n"]
    assert len({group_of(document.id, "/", {"text"}) for document in documents}) == 4


def test_globs_and_several_paths_keep_their_order_and_read_each_file_once(tmp_path: Path) -> None:
    for name in ("x/1.txt", "x/2.txt", "y/1.txt"):
        write(tmp_path / name, name.encode())
    documents = read((f"{tmp_path}/y/*.txt", f"{tmp_path}/**/*.txt"))
    assert [document.text for document in documents] == ["y/1.txt", "x/1.txt", "x/2.txt"]
    assert [document.id for document in documents] == ["y:1.txt", "x:1.txt", "x:2.txt"]


def test_a_url_of_a_folder_is_read_and_fingerprinted(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/one.jsonl.zst", zstandard.compress(jsonl(RECORDS)))
    memory.pipe("/corpus/two.jsonl", jsonl([{"text": "Fourth."}]))
    documents = read("memory://corpus")
    assert described(documents) == [*EXPECTED, ("two.jsonl:1", "Fourth.", "text")]
    assert documents[0].where == "memory:///corpus/one.jsonl.zst, line 1"
    before = fingerprint_sources("memory://corpus")
    memory.pipe("/corpus/two.jsonl", jsonl([{"text": "Fifth.."}]))
    assert fingerprint_sources("memory://corpus") != before


def test_the_embedded_corpus_is_read_by_name() -> None:
    documents = read("embedded:default")
    assert len(documents) == 12_219
    assert {document.source for document in documents} == {"sotu", "factbook"}
    assert len(read("embedded:default_heldout")) == 471
    assert "the embedded ones are default, default_heldout" in refusal("embedded:nothing")


def test_group_of_an_id_is_its_head_unless_that_names_a_source() -> None:
    assert group_of("sotu/1932-Hoover-1/018", "/", {"sotu"}) == "sotu/1932-Hoover-1"
    assert group_of("pubmed/34087609", "/", {"pubmed", "news"}) == "pubmed/34087609"
    assert group_of("news/2446/2", "/", {"pubmed", "news"}) == "news/2446"
    assert group_of("news/2446", "", {"other"}) == "news/2446"
    assert group_of("alone", "/", {"text"}) == "alone"


@pytest.mark.usefixtures("paragraphs")
def test_prepare_with_a_registered_reader_reads_its_suffix_in_splits_and_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sbp_fast.data.input_splits.SPLIT_BYTES", 2000)
    texts = {f"{file}-{number}": f"Paragraph {number**3} of {file}" for file in "ab" for number in range(100)}
    for file in "ab":
        lines = [f"{id}: {text}" for id, text in texts.items() if id.startswith(file)]
        write(tmp_path / f"documents/{file}.paragraphs", "\n".join(lines).encode())
    assert len(find_files(str(tmp_path / "documents"))) == 2
    corpus = {"path": str(tmp_path / "documents"), "vocabulary_size": 270, "unique_share": 0.5, "workers": 2}
    prepare(RunConfig(corpus=CorpusConfig(**corpus)), tmp_path / "out", console=Console(quiet=True))
    prepared = PreparedCorpus(tmp_path / "out")
    parts = (prepared.train, prepared.heldout)
    assert {part.ids[i]: prepared.text(part, i) for part in parts for i in range(len(part))} == texts


@pytest.mark.usefixtures("paragraphs")
def test_a_registered_suffix_stands_in_messages_and_its_records_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "c.paragraphs", b"1: x\nno separator\n3: \n")
    assert [type(item) for item in items(path)] == [Document, UserError, UserError]
    assert str(items(path)[2]).startswith(f"{path}, paragraph 3: a record with an empty text")
    for unusable in (write(tmp_path / "c.docx", b"text\n"), tmp_path / "*.jsonl"):
        assert re.search(r"\.jsonl, \.jsonl\.gz, .*\.parquet, .*\.txt, .*, \.paragraphs", refusal(str(unusable)))


def test_a_suffix_registered_twice_is_refused() -> None:
    class Second(ParagraphReader):
        suffixes = (".txt",)

    with pytest.raises(ValueError, match=r"reader of files with suffix '\.txt' is registered twice"):
        register_reader(Second())


def test_find_reader_takes_the_longest_suffix() -> None:
    class Gzip(ParagraphReader):
        suffixes = (".gz",)

    register_reader(Gzip())
    try:
        assert isinstance(find_reader("x.tar.gz"), Gzip) and find_reader("x.jsonl.gz") is READERS[".jsonl.gz"]
        assert find_reader("x.gz.part") is None
    finally:
        READERS.unregister(".gz")


GOOD = b'{"text": "good"}\n'
BAD_LINES = {
    b'{"text": "cut off\n': r"c.jsonl, line 2: malformed JSON: .* at column 18.* correct or remove",
    b'["text"]\n': r"c.jsonl, line 2: not a JSON object",
    b"17\n": r"c.jsonl, line 2: not a JSON object",
    b'{"text": "x", "n": ' + b"9" * 5000 + b"}\n": r"c.jsonl, line 2: malformed JSON",
    b"[" * 100_000 + b"\n": r"c.jsonl, line 2: malformed JSON",
    b'{"body": "x"}\n': r"c.jsonl, line 2: a record with no text \('text'\).* corpus.text_field",
    b'{"text": null}\n': r"c.jsonl, line 2: a record with no text",
    b'{"text": ["x"]}\n': r"c.jsonl, line 2: a record with a text that is no string",
    b'{"text": " \\n\\t"}\n': r"c.jsonl, line 2: a record with an empty text",
    b'{"text": "x \\ud800 y"}\n': r"c.jsonl, line 2: half a surrogate pair at character 2 of its text",
    b'{"text": "x", "id": "a\\udfff"}\n': r"c.jsonl, line 2: half a surrogate pair at character 1 of its id",
    b'{"text": "x", "source": "\\ud800"}\n': r"c.jsonl, line 2: half a surrogate pair at character 0 of its source",
    b'{"text": "caf\xe9"}\n': r"c.jsonl, line 2: not UTF-8 text; .*UTF-8",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=BAD_LINES.values())
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: bytes) -> None:
    message = refusal(write(tmp_path / "c.jsonl", GOOD + line + GOOD))
    assert re.search(BAD_LINES[line], message), message


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["truncated", "garbled", "not compressed"])
def test_a_damaged_compressed_file_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    whole = jsonl([{"text": f"document number {number**3}"} for number in range(20_000)])
    packed = gzip.compress(whole) if suffix == "gz" else zstandard.ZstdCompressor(write_checksum=True).compress(whole)
    middle = len(packed) // 2
    content = {
        "truncated": packed[:middle],
        "garbled": packed[:middle] + bytes(64) + packed[middle + 64 :],
        "not compressed": whole,
    }[damage]
    path = write(tmp_path / f"c.jsonl.{suffix}", content)
    # a decompressor may hand out garbled text before it notices
    assert refusal(path).startswith(str(path))


def test_a_zst_truncated_after_a_whole_line_is_named(tmp_path: Path) -> None:
    compressor = zstandard.ZstdCompressor().compressobj()
    content = compressor.compress(jsonl(RECORDS)) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    assert "runcated" in refusal(write(tmp_path / "c.jsonl.zst", content))


def test_unusable_files_are_named(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "missing.jsonl")
    assert "nothing matches" in refusal(f"{tmp_path}/*.jsonl")
    empty = write(tmp_path / "empty.jsonl", b"")
    assert refusal(empty).startswith(f"{empty}: holds no documents")
    assert "holds no documents" in refusal(write(tmp_path / "blank.jsonl", b"\n \n"))
    assert "holds no documents" in refusal(write(tmp_path / "empty.jsonl.zst", b""))
    assert "empty text" in refusal(write(tmp_path / "empty.txt", b""))
    (tmp_path / "folder").mkdir()
    assert "the folder holds no documents" in refusal(tmp_path / "folder")
    assert "not a kind of file" in refusal(write(tmp_path / "c.docx", b"text\nx\n"))
    latin = write(tmp_path / "latin.txt", "one\ntwo\nfür\n".encode("latin-1"))
    assert f"{latin}, line 3: not UTF-8" in refusal(latin)
    assert "empty path" in refusal("") and "empty path" in refusal(())


def test_unusable_parquet_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "c.parquet", body=["x"], id=["1"])
    assert refusal(path).startswith(f"{path}: has no column 'text'") and "body, id" in refusal(path)
    assert "c.parquet, row 3: a record with no text" in refusal(
        write_parquet(tmp_path / "c.parquet", text=["x", "y", None], id=["1", "2", "3"])
    )
    whole = path.read_bytes()
    assert "cannot be read" in refusal(write(path, whole[:-20]))
    assert "cannot be read" in refusal(write(path, b"PAR1" + bytes(40) + whole[44:]))
    raw = pa.array([b"good", b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": raw}), path)
    assert f"{path}, row 2: not UTF-8 text" in refusal(path)


def test_unusable_records_come_as_errors_in_their_place(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", GOOD + b"[1]\n" + GOOD + b"\xff\n" + GOOD)
    assert [isinstance(item, UserError) for item in items(path)] == [False, True, False, True, False]
    whole = jsonl([{"text": f"document number {number**3}"} for number in range(200_000)])
    found = items(write(tmp_path / "c.jsonl.gz", gzip.compress(whole)[:-4]))
    assert len(found) > 1000 and [type(item) for item in found[:-1]] == [Document] * (len(found) - 1)
    assert "c.jsonl.gz: cannot be read" in str(found[-1])


def test_a_url_that_cannot_be_opened_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nosuch" in refusal("nosuch://bucket/c.jsonl")

    def absent(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("sbp_fast.data.filesystem.url_to_fs", absent)
    assert "pip install 'sbp-fast[s3]'" in refusal("s3://bucket/c.jsonl")
    assert "Install s3fs" in refusal("gs://bucket")


def test_a_store_exception_of_any_type_becomes_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(Exception):
        pass

    def fail(*_: object, **__: object) -> None:
        raise Refused("no credentials")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "isfile", fail)
    assert "memory://corpus: cannot be read: no credentials" in refusal("memory://corpus")


def test_the_fingerprint_depends_on_content_and_names_not_on_location_and_time(tmp_path: Path) -> None:
    for folder in ("here", "there"):
        write(tmp_path / folder / "sub/1.txt", b"one")
        write(tmp_path / folder / "2.txt", b"two")
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    before = fingerprint_sources(here)
    assert fingerprint_sources(there) == before
    write(tmp_path / "here/2.txt", b"TWO")
    assert fingerprint_sources(here) != before
    write(tmp_path / "here/2.txt", b"two")
    assert fingerprint_sources(here) == before
    (tmp_path / "here/2.txt").rename(tmp_path / "here/3.txt")  # ids are made from names
    assert fingerprint_sources(here) != before
