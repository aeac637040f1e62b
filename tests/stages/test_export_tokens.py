"""Exports, read back by readers written from the formats' specifications."""

import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sbp_fast.data.token_shards import export
from sbp_fast.data.token_shards.blocks import Compression
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.data.token_shards.writer import CorpusWriter
from sbp_fast.errors import UserError
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages.export_tokens import export_tokens

QUIET = Console(quiet=True)
Documents = list[tuple[str, str, list[int]]]


def make(directory: Path, vocabulary: int, compression: Compression = "none", lengths: tuple[int, ...] = ()) -> Corpus:
    generator = np.random.default_rng(0)
    writer = CorpusWriter(directory, vocabulary, 70_000, compression=compression)
    for number, length in enumerate(lengths or (1, 255, 256, 65_535, 65_536, 90_000, 3)):
        tokens = generator.integers(0, vocabulary, length)
        writer.add(tokens, id=f"ä/{number}", source="ab"[number % 2], text_bytes=length, extra=number)
    return writer.close()


def contents(corpus: Corpus) -> Documents:
    rows = zip(corpus.ids, corpus.sources, range(len(corpus)), strict=True)
    return [(id, source, corpus[i].tolist()) for id, source, i in rows]


def read_megatron(directory: Path) -> list[list[int]]:
    """IndexedDataset: header, version, code of the type, counts, lengths, pointers, document boundaries."""
    content = (directory / "tokens.idx").read_bytes()
    assert content[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, documents = struct.unpack_from("<QBQQ", content, 9)
    assert version == 1 and documents == sequences + 1
    lengths = np.frombuffer(content, np.int32, sequences, 34)
    pointers = np.frombuffer(content, np.int64, sequences, 34 + 4 * sequences)
    boundaries = np.frombuffer(content, np.int64, documents, 34 + 12 * sequences)
    assert boundaries.tolist() == list(range(documents)) and len(content) == 34 + 20 * sequences + 8
    stored, dtype = (directory / "tokens.bin").read_bytes(), {8: np.uint16, 4: np.int32}[code]
    return [np.frombuffer(stored, dtype, *one).tolist() for one in zip(lengths.tolist(), pointers.tolist(), strict=True)]


def read_mds(directory: Path) -> Documents:
    """The reader of MDS: a table of where samples start, then samples that begin with the sizes of their columns."""
    index = json.loads((directory / "index.json").read_text())
    documents: Documents = []
    for shard in index["shards"]:
        content = (directory / shard["raw_data"]["basename"]).read_bytes()
        assert len(content) == shard["raw_data"]["bytes"] and shard["column_names"] == ["id", "source", "tokens"]
        (samples,) = struct.unpack_from("<I", content)
        starts = struct.unpack_from(f"<{samples + 1}I", content, 4)
        settings = json.loads(content[4 + 4 * (samples + 1) : starts[0]])
        assert samples == shard["samples"] and settings["column_encodings"] == shard["column_encodings"]
        for start, stop in pairwise(starts):
            documents.append(decode_mds(content[start:stop], shard["column_encodings"][2]))
    return documents


def decode_mds(sample: bytes, encoding: str) -> tuple[str, str, list[int]]:
    sizes = struct.unpack_from("<3I", sample)
    ends = np.cumsum([12, *sizes]).tolist()
    assert ends[-1] == len(sample)
    id, source, array = (sample[start:stop] for start, stop in pairwise(ends))
    axes, width = array[0] >> 2, 1 << (array[0] & 3)
    assert axes == 1
    values = np.frombuffer(array, encoding.removeprefix("ndarray:"), offset=1 + width)
    assert int.from_bytes(array[1 : 1 + width], "little") == len(values)
    return id.decode(), source.decode(), values.tolist()


def read_parquet(directory: Path) -> Documents:
    rows: list[dict[str, Any]] = []
    for path in sorted(directory.glob("*.parquet")):
        rows += pq.read_table(path).to_pylist()
    assert [row["extra"] for row in rows] == list(range(len(rows)))
    return [(row["id"], row["source"], row["tokens"]) for row in rows]


@pytest.mark.parametrize("vocabulary", [1 << 16, 1 << 18])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_exported_corpus_reads_back_every_document(
    tmp_path: Path, vocabulary: int, compression: Compression, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "MDS_SHARD_BYTES", 200_000)
    monkeypatch.setattr(export, "CHUNK_NUMBERS", 3)
    corpus = make(tmp_path / "corpus", vocabulary, compression)
    expected = contents(corpus)
    for to in ("megatron", "mds", "parquet"):
        manifest = export_tokens(tmp_path / "corpus", to, tmp_path / to, console=QUIET)
        assert manifest.counts == {"documents": 7, "tokens": corpus.tokens}
    assert read_megatron(tmp_path / "megatron") == [tokens for *_, tokens in expected]
    assert read_mds(tmp_path / "mds") == read_parquet(tmp_path / "parquet") == expected
    assert len(list((tmp_path / "mds").glob("*.mds"))) > 1


@pytest.mark.parametrize("vocabulary", [1 << 16, 1 << 18])
def test_megatron_reads_the_exported_corpus(tmp_path: Path, vocabulary: int) -> None:
    reader = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    corpus = make(tmp_path / "corpus", vocabulary)
    export_tokens(tmp_path / "corpus", "megatron", tmp_path / "megatron", console=QUIET)
    documents = reader.IndexedDataset(str(tmp_path / "megatron/tokens"))
    assert [documents[i].tolist() for i in range(len(documents))] == [tokens for *_, tokens in contents(corpus)]
    assert documents.document_indices.tolist() == list(range(len(corpus) + 1))


def test_mosaic_reads_the_exported_corpus(tmp_path: Path) -> None:
    reader = pytest.importorskip("streaming.base.format.mds.reader")
    corpus = make(tmp_path / "corpus", 1 << 16)
    export_tokens(tmp_path / "corpus", "mds", tmp_path / "mds", console=QUIET)
    index = json.loads((tmp_path / "mds/index.json").read_text())
    documents = []
    for shard_index in index["shards"]:
        shard = reader.MDSReader.from_json(str(tmp_path / "mds"), None, shard_index)
        samples = [shard.get_item(i) for i in range(shard_index["samples"])]
        documents += [(sample["id"], sample["source"], sample["tokens"].tolist()) for sample in samples]
    assert documents == contents(corpus)


def test_export_of_an_empty_document_an_unknown_format_or_a_damaged_block_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "corpus", 300, lengths=(2, 0))
    with pytest.raises(UserError, match=r"ä/1.* holds no tokens, which MDS cannot store"):
        export_tokens(tmp_path / "corpus", "mds", tmp_path / "out", console=QUIET)
    with pytest.raises(UserError, match="--to arrow: no such format; choose from megatron, mds, parquet"):
        export_tokens(tmp_path / "corpus", "arrow", tmp_path / "out", console=QUIET)
    path = tmp_path / "corpus/tokens-00000.bin"
    path.write_bytes(b"\x01" * len(path.read_bytes()))
    with pytest.raises(UserError, match="block 0 "):
        export_tokens(tmp_path / "corpus", "megatron", tmp_path / "out", console=QUIET)
    assert not list(tmp_path.glob("out*"))
