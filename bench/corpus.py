"""Token shards and near-duplicates: CPU seconds of the whole process on real text, the embedded corpus a few times over.

Writing and reading shards are compared with Megatron-LM's builder, MosaicML's MDS and litdata; MinHash keys with those of
datasketch and datatrove.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from bench.case import Case, Prepared, Provider, no_inputs, no_results
from sbp_fast.config import CorpusConfig, RunConfig
from sbp_fast.data.documents import Document, read_file
from sbp_fast.data.input_files import find_files
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards import blocks
from sbp_fast.data.token_shards.blocks import Compression
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.data.token_shards.writer import CorpusWriter
from sbp_fast.data.tokenizer import join_ids
from sbp_fast.dedup.minhash import BANDS, ROWS, SHINGLE_WORDS, band_keys
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages.prepare import prepare

REPEATS = 4  # of the embedded corpus, in another order each time
SEQUENCE = 4096  # tokens of a sample, for formats that store samples and not documents
BATCH = 512  # documents written at once, as in `prepare`
WINDOWS = 400  # windows read at random in one run
TEXTS = 1500  # documents whose MinHash keys are computed


@dataclass(frozen=True)
class TokenizedCorpus:
    """Documents to write, and a folder for the files.

    Attributes:
        tokens: uint16 tokens of each document.
        sequences: the same tokens, joined and cut into samples of `SEQUENCE`.
        vocabulary_size: of the tokenizer.
        folder: for the files of all formats.
    """

    tokens: list[np.ndarray]
    sequences: list[np.ndarray]
    vocabulary_size: int
    folder: Path

    @property
    def total(self) -> int:
        """Tokens of all documents."""
        return sum(map(len, self.tokens))

    def empty(self, name: str) -> Path:
        """Return an empty folder for `name`."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder


@dataclass(frozen=True)
class DocumentBatch:
    """Arguments of `CorpusWriter.add_batch`.

    Attributes:
        tokens: the tokens of all documents in one array, or a list of ids for each document.
        lengths: int64, tokens of each document.
        columns: document columns by name.
    """

    tokens: Any
    lengths: np.ndarray
    columns: dict[str, Any]


def corpus() -> Iterator[Case]:
    """Writing, reading in order and at random, and MinHash keys."""
    documents = tokenized_corpus()
    tokens, lists = documents.total, [ids.tolist() for ids in documents.tokens]

    def write(writer: Callable[..., Any], items: Sequence[Any], compression: Compression = "none") -> Provider:
        return _provider(partial(writer, documents, items, compression))

    yield _case(
        "write, raw",
        tokens,
        {
            "ours, batches of arrays": write(_ours_batches, _batches(documents.tokens)),
            "ours, batches of lists of ids": write(_ours_lists, _batches(lists)),
            "ours, an array a document": write(_ours, documents.tokens),
            "ours, a list of ids a document": write(_ours, lists),
            "Megatron-LM, a list of ids a document": write(_megatron, lists),
            "Megatron-LM, an array a document": write(_megatron, documents.tokens),
            "MDS, hashed, an array a document": write(_mds, documents.tokens),
            "MDS, hashed, samples of 4096 tokens": write(_mds, documents.sequences),
        },
    )
    packing: dict[str, Provider] = {
        "ours, batches of arrays": write(_ours_batches, _batches(documents.tokens), "zstd"),
        "ours, an array a document": write(_ours, documents.tokens, "zstd"),
        "MDS, hashed, an array a document": write(_mds, documents.tokens, "zstd"),
    }
    yield _case("write, zstd", tokens, packing)
    raw, packed = (_ours(documents, documents.tokens, compression) for compression in ("none", "zstd"))
    read: dict[str, Provider] = {
        "ours, raw, checked": _provider(partial(_read, raw)),
        "ours, zstd, checked": _provider(partial(_read, packed)),
        "MDS": _lazily(lambda: partial(_read_mds, Path(_mds(documents, documents.sequences)))),
        "litdata": _lazily(lambda: _litdata(documents)),
    }
    yield _case("read in order, to int64", tokens, read)
    random: dict[str, Provider] = {
        "ours, raw": _provider(partial(_windows, raw)),
        "ours, zstd, one block cached": _provider(partial(_windows, _with_small_cache(packed))),
    }
    yield _case("read windows of 4096 at random, to int64", WINDOWS * SEQUENCE, random)
    texts = [document.text for document in _texts()][:TEXTS]
    near: dict[str, Provider] = {
        "ours": _provider(partial(_keys, [text.encode() for text in texts])),
        "datatrove, words split by Python": _lazily(lambda: _datatrove(texts)),
        "datasketch, words split by Python": _lazily(lambda: partial(_datasketch, texts)),
    }
    yield _case("MinHash keys of texts", sum(len(text.encode()) for text in texts), near, unit="bytes")


def _case(name: str, work: int, providers: dict[str, Provider], unit: str = "tokens") -> Case:
    shape = {"operation": name, unit: work}
    return Case(shape, no_inputs, providers, None, work=float(work), unit=unit, clock=time.process_time)


def _provider(run: Callable[[], Any]) -> Provider:
    return lambda _: Prepared(run, no_results)


def _lazily(make: Callable[[], Callable[[], Any]]) -> Provider:
    """A provider that needs a package that may be missing, or files that take long to write."""
    run_once_made = cache(make)
    return lambda _: Prepared(run_once_made(), no_results)


def _texts() -> list[Document]:
    items = [item for file in find_files("embedded:default") for item in read_file(file, CorpusConfig())]
    return [item for item in items if isinstance(item, Document)]


def tokenized_corpus() -> TokenizedCorpus:
    """Prepare the embedded corpus and repeat its documents, in another order each time."""
    folder = Path(tempfile.mkdtemp(prefix="sbp-fast-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    prepare(RunConfig(corpus=CorpusConfig(vocabulary_size=32_768)), folder / "prepared", console=Console(quiet=True))
    train = PreparedCorpus(folder / "prepared").train
    random = np.random.default_rng(0)
    order = np.concatenate([random.permutation(len(train)) for _ in range(REPEATS)])
    tokens = [np.array(train[document]) for document in order.tolist()]
    joined = np.concatenate(tokens)
    sequences = [joined[start : start + SEQUENCE] for start in range(0, len(joined) - SEQUENCE, SEQUENCE)]
    return TokenizedCorpus(tokens, sequences, train.vocabulary_size, folder)


def _batches(items: Sequence[Any]) -> list[DocumentBatch]:
    """Documents as they come from files: joined, a batch at a time, with their columns."""
    batches = []
    for start in range(0, len(items), BATCH):
        documents = items[start : start + BATCH]
        names = pa.array(map(str, range(start, start + len(documents))))
        tokens = documents if isinstance(documents[0], list) else np.concatenate(documents)
        columns = {"ids": names, "sources": pa.repeat("bench", len(names)), "text_bytes": np.ones(len(names), np.int64)}
        batches.append(DocumentBatch(tokens, np.array([len(ids) for ids in documents]), columns))
    return batches


def _ours(documents: TokenizedCorpus, items: Sequence[Any], compression: Compression = "none") -> Corpus:
    directory = documents.empty(f"ours-{compression}")
    writer = CorpusWriter(directory, documents.vocabulary_size, compression=compression)
    for index, tokens in enumerate(items):
        writer.add(tokens, id=str(index), source="bench", text_bytes=1)
    return writer.close()


def _ours_batches(documents: TokenizedCorpus, items: Sequence[DocumentBatch], compression: Compression = "none") -> Corpus:
    writer = CorpusWriter(documents.empty(f"ours-{compression}"), documents.vocabulary_size, compression=compression)
    for batch in items:
        writer.add_batch(batch.tokens, batch.lengths, **batch.columns)
    return writer.close()


def _ours_lists(documents: TokenizedCorpus, items: Sequence[DocumentBatch], _: Compression) -> Corpus:
    """Write as `prepare` does with the ids that a tokenizer returns."""
    writer = CorpusWriter(documents.empty("ours-none"), documents.vocabulary_size)
    for batch in items:
        writer.add_batch(*join_ids(batch.tokens), **batch.columns)
    return writer.close()


def _megatron(documents: TokenizedCorpus, items: Sequence[Any], _: Compression) -> None:
    """Write as Megatron-LM's preprocess_data.py does with the ids of each document, which are a list there."""
    library, directory = import_module("megatron.core.datasets.indexed_dataset"), documents.empty("megatron")
    builder = library.IndexedDatasetBuilder(str(directory / "tokens.bin"), dtype=np.uint16)
    for tokens in items:
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(directory / "tokens.idx"))


def _mds(documents: TokenizedCorpus, items: Sequence[np.ndarray], compression: Compression = "none") -> str:
    directory = str(documents.empty(f"mds-{compression}"))
    packing = "zstd:1" if compression == "zstd" else None
    with import_module("streaming").MDSWriter(
        out=directory, columns={"tokens": "ndarray:uint16"}, compression=packing, hashes=["xxh64"]
    ) as writer:
        for tokens in items:
            writer.write({"tokens": tokens})
    return directory


def _read(opened: Corpus) -> None:
    for block in opened.read(checked=True):
        block.astype(np.int64)


def _read_mds(directory: Path) -> None:
    reader = import_module("streaming.base.format.mds.reader").MDSReader
    for entry in json.loads((directory / "index.json").read_text())["shards"]:
        shard = reader.from_json(str(directory), None, entry)
        for index in range(entry["samples"]):
            shard.get_item(index)["tokens"].astype(np.int64)


def _litdata(documents: TokenizedCorpus) -> Callable[[], None]:
    library, writing = import_module("litdata"), import_module("litdata.streaming.writer")
    directory, loader = str(documents.empty("litdata")), library.TokensLoader(block_size=SEQUENCE)
    writer = writing.BinaryWriter(directory, chunk_bytes="64MB", item_loader=loader)
    for index, tokens in enumerate(documents.sequences):
        writer[index] = torch.from_numpy(tokens)
    writer.done()
    writer.merge()

    def run() -> None:
        for sample in library.StreamingDataset(directory, item_loader=library.TokensLoader(block_size=SEQUENCE)):
            sample.long()

    return run


def _windows(opened: Corpus) -> None:
    for start in np.random.default_rng(0).integers(0, opened.tokens - SEQUENCE, WINDOWS).tolist():
        opened.slice(start, start + SEQUENCE).astype(np.int64)


def _with_small_cache(opened: Corpus) -> Corpus:
    """The corpus with a cache of one decompressed block, so that reads miss the cache as in a far larger corpus."""
    usual, blocks.CACHED_BYTES = blocks.CACHED_BYTES, 1
    try:
        return Corpus(opened.directory)
    finally:
        blocks.CACHED_BYTES = usual


def _keys(texts: list[bytes]) -> None:
    offsets = np.array([0, *accumulate(map(len, texts))])
    band_keys(np.frombuffer(b"".join(texts), np.uint8), offsets, SHINGLE_WORDS, BANDS, ROWS)


def _datasketch(texts: list[str]) -> None:
    sketch = import_module("datasketch").MinHash
    for text in texts:
        words = text.lower().split()
        shingles = {" ".join(words[start : start + SHINGLE_WORDS]) for start in range(len(words) - SHINGLE_WORDS + 1)}
        sketch(num_perm=BANDS * ROWS).update_batch([shingle.encode() for shingle in shingles])


def _datatrove(texts: list[str]) -> Callable[[], None]:
    """The signature step of datatrove, without its own word splitting, which takes longer, and without its files."""
    module: Any = import_module("datatrove.pipeline.dedup.minhash")
    config = module.MinhashConfig(n_grams=SHINGLE_WORDS, num_buckets=BANDS, hashes_per_bucket=ROWS)
    usual, module.load_word_tokenizer = module.load_word_tokenizer, lambda language: SimpleNamespace(word_tokenize=str.split)
    try:
        step = module.MinhashDedupSignature("memory://signatures", config)
    finally:
        module.load_word_tokenizer = usual

    def run() -> None:
        for text in texts:
            if len(shingles := step.get_shingles(text)):
                step.get_signature(shingles)

    return run
