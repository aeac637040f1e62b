"""Which files are read and which are left out, and the formats beside JSON lines, parquet and text."""

import bz2
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from sbp_fast.config import CorpusConfig, RunConfig
from sbp_fast.data.documents import Document, group_of, passage_id, read_file
from sbp_fast.data.filesystem import open_system
from sbp_fast.data.input_files import find_files, search_files
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages.prepare import prepare

RECORDS = [{"id": f"set/{n}", "text": f'Text {n}, of\n"two" lines.'} for n in range(5)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
CSV = b"id,text\r\n" + b"".join(b'set/%d,"Text %d, of\n""two"" lines."\r\n' % (n, n) for n in range(5))
FORMS = {
    "lines.json": LINES,
    "array.json": json.dumps(RECORDS).encode(),
    "indented.json": b"\xef\xbb\xbf" + json.dumps(RECORDS, indent=2).encode(),
    "objects.json": "\n".join(json.dumps(record, indent=1) for record in RECORDS).encode(),
    "rows.csv": CSV,
    "capitals.JSONL": LINES,
}
CODECS = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": lambda content: bz2.compress(content[:30]) + bz2.compress(content[30:]),
    ".zst": zstandard.compress,
}


def items(path: Path | str, **settings: object) -> list[Document | UserError]:
    return [item for file in find_files(str(path)) for item in read_file(file, CorpusConfig(**settings))]


def write(path: Path, content: bytes = LINES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", FORMS)
def test_every_form_and_compression_gives_the_same_documents(name: str, codec: str, tmp_path: Path) -> None:
    documents = items(write(tmp_path / f"{name}{codec}", CODECS[codec](FORMS[name])))
    assert [(document.id, document.text) for document in documents] == [(r["id"], r["text"]) for r in RECORDS]


def test_zstd_with_the_window_of_long_31_is_read(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # of unknown size: the window stays
    content = compressor.compress(LINES) + compressor.flush()
    assert zstandard.get_frame_parameters(content).window_size == 1 << 31
    assert len(items(write(tmp_path / "long.jsonl.zst", content))) == 5


@pytest.mark.parametrize("codec", [".gz", ".bz2", ".zst"])
def test_all_documents_before_garbage_behind_compressed_data_are_read(codec: str, tmp_path: Path) -> None:
    content = b"".join(json.dumps({"text": f"document {n**3}"}).encode() + b"\n" for n in range(3000))
    found = items(write(tmp_path / f"c.jsonl{codec}", CODECS[codec](content) + b"garbage behind the end"))
    assert len(found) == 3001 and "compressed data are damaged" in str(found[-1])
    zeros = items(write(tmp_path / "z.jsonl.gz", gzip.compress(content) + bytes(3000)))  # padding, as on tapes
    assert len(zeros) == 3000 and isinstance(zeros[-1], Document)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "x"} {"text": "y"}]', "record 2: malformed JSON: no comma"),
        ("a.json", b'[{"text": "x"}, ', "record 2: malformed JSON"),
        ("a.json", b'[{"text": "x"}] 3', "text after the end"),
        ("a.json", b'[{"text": "x"}, 7]', "record 2: not a JSON object"),
        ("a.json", b'[{"text": NaN}]', "record 1: malformed JSON: NaN"),
        ("a.csv", b"body\nx\n", "has no column 'text'; set corpus.text_field to the one that holds the text, of body"),
        ("a.csv", b"text,id\nx\n", "row 1: 1 fields under a header of 2"),
        ("a.csv", b'text\n"never closed\n', "row 1: malformed CSV"),
        ("a.csv", b"text\ncaf\xe9\n", "row 1: not UTF-8 text"),
    ],
)
def test_a_malformed_file_is_named_with_its_record(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    errors = [str(item) for item in items(write(tmp_path / name, content)) if isinstance(item, UserError)]
    assert len(errors) == 1 and message in errors[0] and "\n" not in errors[0]


def test_nested_fields_are_read_from_objects_and_structs(tmp_path: Path) -> None:
    records = [{"doc": {"text": "inner", "id": 7}, "text": "outer"}, {"doc": 3}]
    pq.write_table(pa.table({"doc": [{"text": "inner", "id": 7}], "text": ["outer"]}), tmp_path / "a.parquet")
    write(tmp_path / "a.jsonl", "".join(json.dumps(record) + "\n" for record in records).encode())
    fields = {"text_field": "doc.text", "id_field": "doc.id"}
    for name in ("a.parquet", "a.jsonl"):
        first, *others = items(tmp_path / name, **fields)
        assert isinstance(first, Document) and (first.id, first.text) == ("7", "inner")
        assert all("no text ('doc.text')" in str(item) for item in others)


@pytest.mark.parametrize("value", [b"7777", 1.5, [1], True], ids=repr)
def test_an_id_or_source_of_another_type_is_refused(value: object, tmp_path: Path) -> None:
    for field in ("id", "source"):
        pq.write_table(pa.table({"text": ["x"], field: [value]}), tmp_path / "a.parquet")
        (item,) = items(tmp_path / "a.parquet")
        assert f"its {field} ('{field}') is of type {type(value).__name__}, neither text nor an integer" in str(item)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.json", "a.csv", "a.txt", "a.parquet"])
def test_a_record_beyond_the_bound_is_refused_and_the_others_are_read(name: str, tmp_path: Path) -> None:
    texts = ["x" * (3 << 20), "short"]
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": texts}), tmp_path / name, row_group_size=1)
    else:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        form = {"json": json.dumps([{"text": text} for text in texts]).encode(), "csv": "\n".join(["text", *texts]).encode()}
        form |= {"txt": texts[0].encode(), "zst": zstandard.compress(lines)}
        write(tmp_path / name, form.get(name.rpartition(".")[2], lines))
    found = items(tmp_path / name, maximum_record_mib=1)
    assert "a record of more than 1 MiB" in str(found[0]) and "corpus.maximum_record_mib" in str(found[0])
    assert len(found) == (2 if "jsonl" in name or "parquet" in name else 1)
    assert all(isinstance(item, Document) for item in found[1:])
    assert all(isinstance(item, Document) for item in items(tmp_path / name))


def test_what_a_folder_or_glob_leaves_out_is_told_with_the_reason(tmp_path: Path) -> None:
    for name in ("a.jsonl", ".hidden.jsonl", "_b.jsonl", ".checkpoints/a.jsonl", "sub/c.jsonl", "README.md", "LICENSE.txt"):
        write(tmp_path / "in" / name)
    write(tmp_path / "elsewhere/d.jsonl")
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/broken.jsonl").symlink_to(tmp_path / "nothing")
    found = search_files(str(tmp_path / "in"))
    assert [file.parts for file in found.files] == [("a.jsonl",), ("sub", "c.jsonl")]
    assert sorted(name for names in found.left_out.values() for name in names) == [
        ".checkpoints/", ".hidden.jsonl", "LICENSE.txt", "README.md", "_b.jsonl", "broken.jsonl", "linked/",
    ]  # fmt: skip
    told = " ".join(search_files(f"{tmp_path}/in/*").describe())
    assert all(
        word in told for word in ("hidden", "LICENSE.txt", "README.md", "folders that the glob matches", "linked", "sub")
    )
    assert len(search_files((str(tmp_path / "in"), f"{tmp_path}/in/LICENSE.txt", f"{tmp_path}/in/linked")).files) == 4
    assert [file.parts for file in find_files(f"{tmp_path}/in/_*.jsonl")] == [("_b.jsonl",)]
    write(tmp_path / "texts/a.txt"), write(tmp_path / "texts/b.txt")
    assert len(find_files(str(tmp_path / "texts"))) == 2


@pytest.mark.parametrize(
    "url", ["ftp://no.such.host.invalid/a.jsonl", "zip://a.jsonl::/no/such/file.zip", "zip://x", "nosuch://x"]
)
def test_a_url_that_cannot_be_opened_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(UserError) as refused:
        open_system(url)
    assert "\n" not in str(refused.value) and url in str(refused.value)


def prepared(path: Path, out: Path, **settings: object) -> PreparedCorpus:
    corpus = {"path": str(path), "vocabulary_size": 270, "unique_share": 0.5, "heldout_share": 0.2, "workers": 1, **settings}
    prepare(RunConfig(corpus=CorpusConfig(**corpus)), out, console=Console(quiet=True))
    return PreparedCorpus(out)


def test_ids_that_share_a_prefix_are_originals_of_their_own_unless_grouping_is_asked_for(tmp_path: Path) -> None:
    lines = [json.dumps({"id": f"https://en.example.org/wiki/{n}", "text": f"Page {n}."}) + "\n" for n in range(100)]
    write(tmp_path / "in/a.jsonl", "".join(lines).encode())
    write(tmp_path / "in/empty.jsonl", b"")
    corpus = prepared(tmp_path / "in", tmp_path / "off")
    assert (len(corpus.train), len(corpus.heldout)) == (80, 20) and corpus.counts["empty_files"] == 1
    assert len({corpus.group(str(id)) for id in corpus.train.ids}) == 80
    with pytest.raises(UserError, match="100 documents belong to 1 originals"):
        prepared(tmp_path / "in", tmp_path / "on", group_separator="/")
    few = [json.dumps({"id": f"{n // 2}/{n}", "text": f"Page {n}."}) + "\n" for n in range(100)]
    counts = prepared(write(tmp_path / "few.jsonl", "".join(few).encode()), tmp_path / "few", group_separator="/").counts
    assert [counts[key] for key in ("joined_documents", "joined_originals", "largest_original")] == [100, 50, 2]


def test_passages_are_parts_of_one_original_without_a_separator_too() -> None:
    passage = passage_id("https://en.example.org/1984", 3, "")
    assert passage != "https://en.example.org/1984" and group_of(passage, "", {"text"}) == "https://en.example.org/1984"


def test_a_folder_of_empty_files_is_refused_and_so_is_a_named_empty_file(tmp_path: Path) -> None:
    empty = write(tmp_path / "in/empty.jsonl", b"")
    for path in (tmp_path / "in", empty):
        with pytest.raises(UserError, match="holds no documents"):
            prepared(path, tmp_path / "out")


def test_too_few_documents_are_refused_with_what_was_held_out_and_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "the same"}\n' * 60)
    with pytest.raises(UserError, match=r"too few to work with \(1 are held out; dropped were \d+ exact duplicates"):
        prepared(path, tmp_path / "out")
