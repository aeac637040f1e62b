import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_corpora import DOCUMENTS, MODES, write

from sbp_fast.data.token_shards import blocks
from sbp_fast.data.token_shards.blocks import TABLE, Compression
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.data.token_shards.writer import CorpusWriter
from sbp_fast.errors import UserError

CORRUPTIONS = 300  # in each mode


@settings(max_examples=60)
@given(
    documents=DOCUMENTS,
    shard_tokens=st.integers(1, 200),
    block_tokens=st.integers(1, 50),
    compression=st.sampled_from(MODES),
    wide=st.booleans(),
    data=st.data(),
)
def test_a_written_corpus_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    shard_tokens: int,
    block_tokens: int,
    compression: Compression,
    wide: bool,
    data: st.DataObject,
) -> None:
    directory = tmp_path_factory.mktemp("corpus")
    if wide:
        documents.append([1 << 20])
    storage = {"compression": compression, "block_tokens": block_tokens}
    write(directory, documents, shard_tokens, 1 << 21 if wide else 1 << 16, **storage)
    corpus = Corpus(directory)
    assert [corpus[i].tolist() for i in range(len(corpus))] == documents
    assert [corpus[i - len(corpus)].tolist() for i in range(len(corpus))] == documents
    part = data.draw(st.slices(len(documents)))
    assert [tokens.tolist() for tokens in corpus[part]] == documents[part]
    assert corpus[np.int32(-1)].tolist() == documents[-1]
    assert [tokens.tolist() for tokens in pickle.loads(pickle.dumps(corpus))] == documents
    assert corpus.text_bytes.tolist() == [3 * len(tokens) for tokens in documents]
    assert corpus.column("seed").tolist() == [10 * number for number in range(len(documents))]
    assert corpus.documents.column_names == ["id", "source", "text_bytes", "tokens", "seed"]
    stream = [token for tokens in documents for token in tokens]
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert corpus.slice(start, stop).tolist() == stream[start:stop]
    assert np.concatenate([corpus.slice(0, 0), *corpus.read()]).tolist() == stream
    assert corpus[0].dtype == corpus.dtype == (np.uint32 if wide else np.uint16)
    corpus.verify()
    count = data.draw(st.integers(1, len(documents)))
    prefix = corpus.prefix(count)
    assert [prefix[i].tolist() for i in range(len(prefix))] == documents[:count]
    again = pickle.loads(pickle.dumps(prefix))
    assert [tokens.tolist() for tokens in again[:]] == documents[:count] and again.fingerprint == prefix.fingerprint
    assert prefix[-1].tolist() == documents[count - 1]
    assert prefix.tokens == sum(map(len, documents[:count])) and list(prefix.ids) == list(corpus.ids[:count])
    assert sum(map(len, prefix.read())) == prefix.tokens and len(prefix.documents) == count
    assert (
        [prefix.id(number) for number in range(count)]
        == np.concatenate([*prefix.column_parts("id")]).tolist()
        == list(prefix.ids)
    )
    with pytest.raises(IndexError):
        prefix[count]
    shutil.rmtree(directory)


@settings(max_examples=30)
@given(rows=st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=10))
def test_ids_and_sources_may_be_any_text(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    writer = CorpusWriter(tmp_path_factory.mktemp("corpus"), 10, 5)
    for id, source in rows:
        writer.add([1, 2], id=id, source=source, text_bytes=0)
    corpus = writer.close()
    assert list(zip(corpus.ids, corpus.sources, strict=True)) == rows


@pytest.mark.parametrize("compression", MODES)
def test_a_document_of_a_million_tokens_among_empty_ones(tmp_path: Path, compression: Compression) -> None:
    long = np.random.default_rng(0).integers(0, 1 << 16, 1_000_000)
    corpus = write(tmp_path, [[], long, [], [7]], 1 << 19, compression=compression)
    assert [len(corpus[i]) for i in range(4)] == [0, 1_000_000, 0, 1]
    assert np.array_equal(corpus[1], long) and corpus[3].tolist() == [7]
    assert np.array_equal(corpus.slice(65_535, 65_537), long[65_535:65_537])


@pytest.fixture(params=MODES)
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Three shards of 200 or so tokens in blocks of 64, the values of a smaller range so that they compress."""
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 300, 40).tolist() for _ in range(12)]
    write(tmp_path / "corpus", documents, 200, compression=request.param, block_tokens=64)
    return tmp_path / "corpus"


def test_opening_reads_no_table_of_documents(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("read a table")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "read_table", refuse)
        opened = Corpus(corpus)
        assert len(opened.prefix(3)) == 3 and len(opened[5]) == 40
        assert isinstance(opened.offsets.base, np.memmap)
    assert opened.ids[11] == "d/11"


def test_raw_documents_are_views_of_the_file(tmp_path: Path) -> None:
    opened = write(tmp_path, [[1, 2, 3]] * 9, 8, block_tokens=2)
    assert not any(opened[i].flags.owndata or opened[i].flags.writeable for i in range(len(opened)))


def test_a_corpus_of_more_files_than_may_be_open_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MAPPED_FILES", 2)
    opened = write(tmp_path, [[number] for number in range(20)], 1)
    assert [opened[i].tolist() for i in (*range(20), *range(20))] == [[i] for i in (*range(20), *range(20))]


def complaint(directory: Path) -> UserError | None:
    try:
        Corpus(directory).verify()
    except UserError as error:
        return error
    return None


def test_every_missing_file_is_named(corpus: Path) -> None:
    files = sorted(file for file in corpus.iterdir() if file.name != "index.json")
    assert len(files) == 3 * 3 + 1
    for file in files:
        whole = file.read_bytes()
        file.unlink()
        found = complaint(corpus)
        assert found and found.where == str(file) and "missing" in found.what
        file.write_bytes(whole)
    (corpus / "index.json").unlink()
    with pytest.raises(UserError, match="holds no token shards"):
        Corpus(corpus)


@settings(max_examples=CORRUPTIONS, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_flipped_bit_and_every_truncation_is_named(corpus: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(sorted(corpus.iterdir())))
    whole = file.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    if data.draw(st.booleans()):
        del damaged[at:]
    else:
        damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    if file.name == "index.json" and same_json(whole, bytes(damaged)):
        return  # white space alone: nothing is damaged
    try:
        file.write_bytes(damaged)
        found = complaint(corpus)
        assert found and found.where == str(file) and "\n" not in str(found)
        if file.name.startswith("tokens"):
            ends = np.fromfile(corpus / file.name.replace("tokens", "blocks"), TABLE)["end"]
            assert f"block {np.searchsorted(ends, at, 'right')}" in found.what
    finally:
        file.write_bytes(whole)
    Corpus(corpus).verify()


def same_json(first: bytes, second: bytes) -> bool:
    try:
        return bool(json.loads(first) == json.loads(second))
    except ValueError:
        return False


def test_bytes_after_the_end_of_a_file_are_named_as_damage(corpus: Path) -> None:
    for file in sorted(corpus.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(whole + b"{}")
        found = complaint(corpus)
        assert found and found.where == str(file)
        file.write_bytes(whole)


def test_opening_names_a_truncated_or_missing_file(corpus: Path) -> None:
    file = corpus / "tokens-00001.bin"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{file}: \d+ bytes long instead of {len(content)}, cut in block 3;"):
        Corpus(corpus)
    file.unlink()
    with pytest.raises(UserError, match=f"{file}: missing"):
        Corpus(corpus)


def flip_in_block(corpus: Path, block: int) -> str:
    """Damage a block of the second shard without a change of size; returns the file."""
    file = corpus / "tokens-00001.bin"
    content = bytearray(file.read_bytes())
    content[int(np.fromfile(corpus / "blocks-00001.bin", TABLE)["end"][block]) - 1] ^= 16
    file.write_bytes(content)
    return str(file)


def test_reading_in_order_checks_every_block(corpus: Path) -> None:
    file = flip_in_block(corpus, 1)
    read: list[np.ndarray] = []
    with pytest.raises(UserError, match="block 1 ") as caught:
        read.extend(Corpus(corpus).read())
    assert caught.value.where == file and sum(map(len, read)) == 200 + 64  # the first shard, and a block


def test_compressed_blocks_are_checked_when_touched_and_raw_ones_on_request(corpus: Path) -> None:
    flip_in_block(corpus, 1)
    opened = Corpus(corpus)
    assert len(opened.slice(200, 264)) == 64
    if "zstd" in (corpus / "index.json").read_text():
        with pytest.raises(UserError, match="block 1 "):
            opened.slice(200, 265)
    else:
        assert sum(map(len, opened.read(checked=False))) == opened.tokens == 480


def test_another_format_is_refused_with_the_remedy(corpus: Path) -> None:
    index = json.loads((corpus / "index.json").read_text())
    for found in ({**index, "format": 1}, [], 5):
        (corpus / "index.json").write_text(json.dumps(found))
        with pytest.raises(UserError, match=r"index\.json: format .* is not 2; make the corpus again"):
            Corpus(corpus)


def test_the_fingerprint_depends_on_content_alone(tmp_path: Path) -> None:
    documents = [[1, 2, 3], [4, 5], [6]]
    first = write(tmp_path / "first", documents, 100)
    assert write(tmp_path / "second", documents, 100).fingerprint == first.fingerprint
    assert write(tmp_path / "third", [[1, 2, 3], [6], [4, 5]], 100).fingerprint != first.fingerprint
    assert first.prefix(2).fingerprint != first.prefix(1).fingerprint != first.fingerprint


@pytest.fixture
def remote(corpus: Path) -> Iterator[str]:
    """The corpus behind a URL."""
    memory = fsspec.filesystem("memory")
    memory.put(str(corpus), "/remote", recursive=True)
    yield "memory://remote"
    memory.rm("/remote", recursive=True)


def test_a_remote_corpus_is_read_by_ranges_and_recent_blocks_stay_in_memory(
    corpus: Path, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, opened = Corpus(corpus), Corpus(remote)
    assert opened.fingerprint == local.fingerprint and opened.tokens == 480
    memory, asked = type(fsspec.filesystem("memory")), []
    cat_file = memory.cat_file

    def spy(self: object, path: str, start: int | None = None, end: int | None = None, **options: object) -> bytes:
        asked.append((Path(path).name, start, end))
        return cat_file(self, path, start, end, **options)

    monkeypatch.setattr(memory, "cat_file", spy)
    ends = np.fromfile(corpus / "blocks-00001.bin", TABLE)["end"].tolist()
    for _ in range(2):
        assert np.array_equal(opened.slice(264, 300), local.slice(264, 300))
    assert asked == [("blocks-00001.bin", None, None), ("tokens-00001.bin", ends[0], ends[1])]
    assert list(opened.ids) == list(local.ids)
    assert all(np.array_equal(opened[i], local[i]) for i in range(12))
    opened.verify()
    monkeypatch.setattr(blocks, "CACHED_BYTES", 2 * 64 * 2)
    small = Corpus(remote)
    asked.clear()
    for block in (0, 1, 0, 1, 2, 0):
        small.slice(block * 64, block * 64 + 1)
    assert len([name for name, *_ in asked if name == "tokens-00000.bin"]) == 4  # three, and the first again


@pytest.mark.parametrize("name", ["tokens-00001.bin", "blocks-00001.bin", "documents-00001.parquet", "offsets.bin"])
def test_a_damaged_remote_file_is_named(remote: str, name: str) -> None:
    memory = fsspec.filesystem("memory")
    content = bytearray(memory.cat_file(f"/remote/{name}"))
    content[len(content) // 2] ^= 1
    memory.pipe(f"/remote/{name}", bytes(content))
    with pytest.raises(UserError, match=f"memory://remote/{name}: .*not as it was written") as caught:
        opened = Corpus(remote)
        if name.startswith("documents"):
            opened.column("id")
        opened.slice(0, opened.tokens)
    assert ("block" in caught.value.what) == name.startswith("tokens")
    memory.rm(f"/remote/{name}")
    with pytest.raises(UserError, match=name):
        Corpus(remote).verify()


def test_a_remote_folder_without_a_corpus_is_refused() -> None:
    with pytest.raises(UserError, match="memory://nothing: holds no token shards"):
        Corpus("memory://nothing")
