"""Documents added by ones and in batches give the same shards."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpora import DOCUMENTS, MODES, write

from sbp_fast.data.token_shards import writer as corpus_writer
from sbp_fast.data.token_shards.blocks import Compression
from sbp_fast.data.token_shards.writer import CorpusWriter

GIVEN = {"lists": list, "numpy": np.asarray, "arrow": pa.array, "chunks": lambda values: pa.chunked_array([pa.array(values)])}


@settings(max_examples=40)
@given(
    documents=DOCUMENTS,
    shard_tokens=st.integers(1, 100),
    block_tokens=st.integers(1, 50),
    compression=st.sampled_from(MODES),
    joined_tokens=st.integers(1, 60),
    data=st.data(),
)
def test_batches_write_the_bytes_that_single_documents_do(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    shard_tokens: int,
    block_tokens: int,
    compression: Compression,
    joined_tokens: int,
    data: st.DataObject,
) -> None:
    storage: dict[str, Any] = {"compression": compression, "block_tokens": block_tokens}
    first, second = tmp_path_factory.mktemp("ones"), tmp_path_factory.mktemp("batches")
    write(first, documents, shard_tokens, **storage)
    writer = CorpusWriter(second, 65_536, shard_tokens, **storage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_writer, "JOINED_TOKENS", joined_tokens)
        done = 0
        while done < len(documents):
            numbers = range(done, data.draw(st.integers(done + 1, len(documents))))
            if data.draw(st.booleans()):
                add_batch(writer, documents, numbers, GIVEN[data.draw(st.sampled_from(sorted(GIVEN)))])
            else:
                kind = data.draw(st.sampled_from([list, tuple, np.array]))
                for number in numbers:
                    tokens = documents[number]
                    writer.add(
                        kind(tokens), id=f"d/{number}", source="ab"[number % 2], text_bytes=3 * len(tokens), seed=number * 10
                    )
            done = numbers.stop
        writer.close()
    assert contents(first) == contents(second)
    shutil.rmtree(first)
    shutil.rmtree(second)


def test_long_ids_and_narrow_types_give_the_same_bytes(tmp_path: Path) -> None:
    ids = [f"{number}/" + "long" * 250 * (number % 3) for number in range(4000)]  # pages of the table end within a batch
    one, many = CorpusWriter(tmp_path / "ones", 10), CorpusWriter(tmp_path / "batches", 10)
    for id in ids:
        one.add([1, 2], id=id, source="s", text_bytes=5)
    for start in range(0, len(ids), 333):
        some = pa.array(ids[start : start + 333], pa.large_string())
        count = len(some)
        sources, text_bytes = pa.array(["s"] * count).dictionary_encode(), np.full(count, 5, np.uint8)
        many.add_batch(np.array([1, 2] * count, np.uint8), [2] * count, ids=some, sources=sources, text_bytes=text_bytes)
    assert one.close().fingerprint == many.close().fingerprint
    assert contents(tmp_path / "ones") == contents(tmp_path / "batches")


def add_batch(writer: CorpusWriter, documents: list[list[int]], numbers: range, given: Callable[[list[Any]], Any]) -> None:
    """The documents of these numbers as `write` has them; `given` makes a column of a list."""
    batch = [documents[number] for number in numbers]
    writer.add_batch(
        np.array([token for tokens in batch for token in tokens], np.uint32),
        [len(tokens) for tokens in batch],
        ids=given([f"d/{number}" for number in numbers]),
        sources=given(["ab"[number % 2] for number in numbers]),
        text_bytes=given([3 * len(tokens) for tokens in batch]),
        seed=given([number * 10 for number in numbers]),
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_a_batch_with_inconsistent_columns_is_refused(tmp_path: Path) -> None:
    writer = CorpusWriter(tmp_path, 10, 100)
    for lengths in ([1, 1], [2, 2], [4, -1]):
        with pytest.raises(ValueError, match=f"3 tokens for documents of {sum(lengths)}, none shorter than 0"):
            writer.add_batch(np.array([1, 2, 3]), lengths, ids=["a", "b"], sources=["s", "s"], text_bytes=[0, 0])
    with pytest.raises(ValueError, match="length"):
        writer.add_batch(np.array([1, 2, 3]), [1, 2], ids=["a"], sources=["s", "s"], text_bytes=[0, 0])
    assert not writer.finish()


def test_a_token_outside_the_vocabulary_is_not_written(tmp_path: Path) -> None:
    for tokens in ([1, 10], [1, -1], [1, 1 << 32], np.array([1, -1]), np.array([1, 10], np.uint16)):
        with pytest.raises(ValueError, match="in a vocabulary of 10"):
            write(tmp_path, [tokens], 100, vocabulary=10)
    assert not list(tmp_path.iterdir())


def test_documents_of_one_corpus_have_the_same_columns(tmp_path: Path) -> None:
    writer = CorpusWriter(tmp_path, 10, 100)
    writer.add_batch(np.zeros(0), [], ids=[], sources=[], text_bytes=[], seed=[])
    writer.add([1], id="a", source="s", text_bytes=0, seed=3)
    with pytest.raises(ValueError, match="columns sample of a table that has seed"):
        writer.add([1], id="b", source="s", text_bytes=0, sample=3)
    with pytest.raises(ValueError, match=r"columns .*, sample \(int64\) of a table that has .*, seed \(int64\)"):
        writer.add_batch(np.array([1]), [1], ids=["b"], sources=["s"], text_bytes=[0], sample=[3])
    with pytest.raises(ValueError, match=r"columns .*, seed \(int32\) of a table that has .*, seed \(int64\)"):
        writer.add_batch(np.array([1]), [1], ids=["b"], sources=["s"], text_bytes=[0], seed=np.array([3], np.int32))
    assert len(writer.close()) == 1
