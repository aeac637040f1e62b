"""Web archives: which records are documents, and what is said of the others."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from sbp_fast.config import CorpusConfig, RunConfig
from sbp_fast.data.documents import Document, read_file
from sbp_fast.data.input_files import find_files
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages.prepare import prepare

PAGE = "http://example.org/{}"


def record(kind: str, content: bytes, **headers: str) -> bytes:
    """Return a record as the standard's annex B has it."""
    lines = ["WARC/1.0", f"WARC-Type: {kind}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    lines.append(f"Content-Length: {len(content)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content + b"\r\n\r\n"


def text_record(number: int, text: str, **headers: str) -> bytes:
    values = {"WARC_Target_URI": PAGE.format(number), "WARC_Record_ID": f"<urn:uuid:{number}>", "Content_Type": "text/plain"}
    return record("conversion", text.encode(), **{**values, **headers})


INFO = record("warcinfo", b"isPartOf: CC-MAIN\r\n", Content_Type="application/warc-fields")


def read(path: Path, **settings: Any) -> list[Document | UserError]:
    config = CorpusConfig(path=str(path), **settings)
    return [item for file in find_files(config.path) for item in read_file(file, config)]


def write(path: Path, *records: bytes) -> Path:
    """Write records; in a .gz file each is a member of its own, as Common Crawl has them."""
    path.write_bytes(b"".join(map(gzip.compress, records) if path.suffix == ".gz" else records))
    return path


@pytest.mark.parametrize("name", ["part.warc.wet.gz", "part.warc.gz", "part.wet", "PART.WARC"])
def test_conversions_to_plain_text_are_documents_named_by_their_record(name: str, tmp_path: Path) -> None:
    request = record("request", b"GET / HTTP/1.1\r\n\r\n", Content_Type="application/http; msgtype=request")
    path = write(tmp_path / name, INFO, text_record(1, "Ein Schiff,\n\nein Häfen.\n"), request, text_record(2, "WARC/1.0\r\n"))
    documents = read(path)
    assert [(d.id, d.text) for d in documents if isinstance(d, Document)] == [
        ("<urn:uuid:1>", "Ein Schiff,\n\nein Häfen.\n"),
        ("<urn:uuid:2>", "WARC/1.0\r\n"),
    ]
    assert len(documents) == 2


def test_headers_of_a_record_are_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "part.wet", text_record(7, "A text.", WARC_Identified_Content_Language="eng"))
    (document,) = read(path, id_field="WARC-Target-URI", source_field="WARC-Identified-Content-Language")
    assert isinstance(document, Document)
    assert (document.id, document.source, document.text) == ("http://example.org/7", "eng", "A text.")


def test_a_record_that_is_no_text_is_named_and_the_next_ones_are_read(tmp_path: Path) -> None:
    response = record("response", b"HTTP/1.1 200 OK\r\n\r\n<p>", Content_Type="application/http; msgtype=response")
    latin = text_record(3, "").replace(b"Content-Length: 0\r\n\r\n", b"Content-Length: 1\r\n\r\n\xe9")
    path = write(tmp_path / "part.warc.gz", response, latin, text_record(4, "x" * (1 << 20) + "y"), text_record(5, "Read."))
    *problems, last = read(path, maximum_record_mib=1)
    assert isinstance(last, Document) and last.text == "Read."
    assert [str(problem).partition("; ")[0].removeprefix(f"{path}, ") for problem in problems] == [
        "record 1: a record of type response with application/http",
        "record 2, line 1: not UTF-8 text",
        "record 3: a record of more than 1 MiB",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (text_record(1, "whole") + text_record(2, "a longer text")[:-9], "record 2: the file ends in the middle of it"),
        (b"<html></html>", "record 1: does not begin with WARC/ and a version"),
        (b"WARC/1.0\r\nWARC-Type conversion\r\n\r\n", "record 1: a header without a colon: 'WARC-Type conversion'"),
        (b"WARC/1.0\r\nWARC-Type: conversion\r\n\r\n", "record 1: has no Content-Length"),
        (b"WARC/1.0\r\nX: " + b"x" * 70_000, "record 1: a header of more than 65536 bytes"),
    ],
)
def test_a_damaged_archive_is_named_with_its_record(content: bytes, message: str, tmp_path: Path) -> None:
    *_, problem = read(write(tmp_path / "part.wet", content))
    assert isinstance(problem, UserError) and f"{tmp_path}/part.wet, {message}" in str(problem)


def test_prepare_makes_the_same_corpus_of_an_archive_as_of_json_lines(tmp_path: Path) -> None:
    texts = [f"Page {number} of a crawl, about {number * 37} things." for number in range(40)]
    write(tmp_path / "part.warc.wet.gz", INFO, *(text_record(number, text) for number, text in enumerate(texts)))
    lines = (json.dumps({"id": f"<urn:uuid:{number}>", "text": text}) + "\n" for number, text in enumerate(texts))
    (tmp_path / "part.jsonl").write_text("".join(lines))
    made = []
    for name in ("part.warc.wet.gz", "part.jsonl"):
        corpus = {"path": str(tmp_path / name), "vocabulary_size": 300, "unique_share": 0.5, "heldout_share": 0.2}
        config = RunConfig.model_validate({"threads": 1, "corpus": corpus})
        prepare(config, tmp_path / f"{name}.out", console=Console(quiet=True))
        made.append(PreparedCorpus(tmp_path / f"{name}.out"))
    assert made[0].train.fingerprint == made[1].train.fingerprint and made[0].heldout.fingerprint == made[1].heldout.fingerprint
