import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sbp_fast.corpus.shards import Corpus, CorpusWriter
from sbp_fast.errors import UserError

DOCUMENTS = st.lists(st.lists(st.integers(0, 65_535), min_size=1, max_size=30), min_size=1, max_size=25)


def write(directory: Path, documents: list[list[int]], shard_tokens: int, vocabulary: int = 65_536) -> Corpus:
    writer = CorpusWriter(directory, vocabulary, shard_tokens)
    for number, tokens in enumerate(documents):
        writer.add(tokens, id=f"d/{number}", source="ab"[number % 2], text_bytes=3 * len(tokens), seed=number * 10)
    return writer.close()


@settings(max_examples=40)
@given(documents=DOCUMENTS, shard_tokens=st.integers(1, 200), wide=st.booleans(), data=st.data())
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], shard_tokens: int, wide: bool, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("corpus")
    if wide:
        documents[0][0] = 1 << 20
    write(directory, documents, shard_tokens, 1 << 21 if wide else 1 << 16)
    corpus = Corpus(directory)
    assert [corpus[i].tolist() for i in range(len(corpus))] == documents
    assert list(corpus.ids) == [f"d/{number}" for number in range(len(documents))]
    assert corpus.text_bytes.tolist() == [3 * len(tokens) for tokens in documents]
    assert corpus.column("seed").tolist() == [10 * number for number in range(len(documents))]
    assert all(isinstance(corpus[i], np.memmap) for i in range(len(corpus)))  # views: documents do not cross shards
    stream = [token for tokens in documents for token in tokens]
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert corpus.slice(start, stop).tolist() == stream[start:stop]
    assert corpus[0].dtype == (np.uint32 if wide else np.uint16)
    corpus.verify()
    count = data.draw(st.integers(1, len(documents)))
    prefix = corpus.prefix(count)
    assert [prefix[i].tolist() for i in range(len(prefix))] == documents[:count]
    assert prefix.tokens == sum(map(len, documents[:count])) and list(prefix.ids) == list(corpus.ids[:count])
    with pytest.raises(IndexError):
        prefix[count]
    shutil.rmtree(directory)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    write(tmp_path / "corpus", [generator.integers(0, 65_536, 40).tolist() for _ in range(12)], shard_tokens=200)
    return tmp_path / "corpus"


def names_the_damage(directory: Path, file: Path) -> bool:
    try:
        Corpus(directory).verify()
    except UserError as error:
        return error.where == str(file)
    return False


def test_every_missing_file_is_named(corpus: Path) -> None:
    files = sorted(file for file in corpus.iterdir() if file.name != "index.json")
    assert len(files) == 6
    for file in files:
        whole = file.read_bytes()
        file.unlink()
        assert names_the_damage(corpus, file), file.name
        file.write_bytes(whole)
    (corpus / "index.json").unlink()
    with pytest.raises(UserError, match="holds no token shards"):
        Corpus(corpus)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_truncation_or_flipped_byte_is_named(corpus: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(sorted(corpus.iterdir())))
    whole = file.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    if data.draw(st.booleans()):
        del damaged[at:]
    else:
        damaged[at] ^= data.draw(st.integers(1, 255))
    if file.name == "index.json" and same_json(whole, bytes(damaged)):
        return  # white space alone: nothing is damaged
    try:
        file.write_bytes(damaged)
        assert names_the_damage(corpus, file)
    finally:
        file.write_bytes(whole)
    Corpus(corpus).verify()


def same_json(first: bytes, second: bytes) -> bool:
    try:
        return json.loads(first) == json.loads(second)
    except ValueError:
        return False


def test_the_fingerprint_is_of_content(tmp_path: Path) -> None:
    documents = [[1, 2, 3], [4, 5], [6]]
    first = write(tmp_path / "first", documents, 100)
    assert write(tmp_path / "second", documents, 100).fingerprint == first.fingerprint
    assert write(tmp_path / "third", [[1, 2, 3], [6], [4, 5]], 100).fingerprint != first.fingerprint
    assert first.prefix(2).fingerprint != first.prefix(1).fingerprint != first.fingerprint
