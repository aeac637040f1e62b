"""The data stages as users run them, at growing numbers of documents: CPU seconds and peak memory of each.

The corpus is made up: documents of forty words, most of them from the words of their topic and of its field, in files of a
hundred. A field has fifty topics, and a topic twenty documents, but one has five thousand, so that some documents are near to
very many. Vectors come from a static encoder, a table of vectors of words. The synthetic documents that `filter` reads are made
up too, a quarter as many as unique ones.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import machine
from bench.case import Case, Prepared, Schedule, Tensors, no_inputs, no_results
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.writer import CorpusWriter
from sbp_fast.data.tokenizer import join_ids
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage

SIZES = (250_000, 500_000, 1_000_000)
TINY_DOCUMENTS = 6_000
DOCUMENT_WORDS, TOPIC_WORDS, FIELD_WORDS, WORDS = 40, 8, 8, 30_000
TOPIC_SHARE, FIELD_SHARE = 0.35, 0.6  # of a document's words
TOPIC_DOCUMENTS, FIELD_TOPICS, HUB_DOCUMENTS, FILE_DOCUMENTS, BATCH = 20, 50, 5_000, 100, 10_000
DIMENSION = 64
ONCE = Schedule(rounds=1, min_rounds=1, warm_up=0)
SETTINGS = (
    "corpus.path=documents",
    "corpus.vocabulary_size=8192",
    "corpus.unique_share=1",
    "embed.model=encoder",
    "pair.backend=auto",  # small.toml has hnsw for its index, which takes many times as long (bench/results/*/pairs.json)
    "threads=2",
)
STAGES = {
    "prepare": ("prepare", "--out", "prepare"),
    "embed": ("embed", "--corpus", "prepare", "--out", "embed"),
    "pair": ("pair", "--corpus", "prepare", "--vectors", "embed", "--out", "pair"),
    "filter": ("filter", "--corpus", "prepare", "--synthetic", "synthesize", "--out", "filter"),
}


def scale() -> Iterator[Case]:
    """Return each stage at each size; a stage reads what the stages before it wrote."""
    for documents in (TINY_DOCUMENTS,) if machine.tiny() else SIZES:
        with tempfile.TemporaryDirectory(prefix="sbp-fast-bench-") as name:
            folder = Path(name)
            write_documents(folder / "documents", documents)
            write_encoder(folder / "encoder")
            for stage in STAGES:
                if stage == "filter":
                    write_synthetic(folder / "prepare", folder / "synthesize")
                yield _case(folder, stage, documents)


def _case(folder: Path, stage: str, documents: int) -> Case:
    peak: dict[str, float] = {}

    def provider(_: Tensors) -> Prepared:
        return Prepared(partial(_run, folder, stage, peak), no_results)

    shape = {"stage": stage, "documents": documents}
    return Case(
        shape,
        no_inputs,
        {"ours": provider},
        None,
        work=float(documents),
        unit="documents",
        statistics=peak,
        clock=_seconds_of_children,
        schedule=ONCE,
    )


def _run(folder: Path, stage: str, peak: dict[str, float]) -> None:
    """Run a stage as a command; `peak` gets the most memory of its processes together, in GiB."""
    command = [sys.executable, "-m", "sbp_fast", STAGES[stage][0], "small", *SETTINGS, *STAGES[stage][1:], "--force"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ended, most = threading.Event(), [0]

    def watch() -> None:
        while not ended.wait(0.2):
            most[0] = max(most[0], sum(map(_proportional_bytes, _descendants(process.pid))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    ended.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{stage}: {output.strip().splitlines()[-1]}")
    peak["peak GiB"] = most[0] / 2**30


def _descendants(process: int) -> Iterator[int]:
    yield process
    for thread in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children = thread.read_text().split()
        except OSError:  # it has ended
            continue
        for child in children:
            yield from _descendants(int(child))


def _proportional_bytes(process: int) -> int:
    """Return the memory of a process; what it shares with others counts for its part."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def _seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def write_documents(folder: Path, documents: int) -> None:
    """Write the corpus as JSON lines into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for first in range(0, documents, BATCH):
        words = _document_words(np.arange(first, min(first + BATCH, documents)))
        for start in range(0, len(words), FILE_DOCUMENTS):
            rows = words[start : start + FILE_DOCUMENTS]
            lines = (json.dumps({"id": f"d{first + start + row}", "text": text}) for row, text in enumerate(map(_text, rows)))
            (folder / f"{first + start:08d}.jsonl").write_text("".join(f"{line}\n" for line in lines))


def _document_words(numbers: np.ndarray) -> np.ndarray:
    """Return the words of documents, int64 [documents, DOCUMENT_WORDS], from those of the topic, of its field and of all."""
    shape, random = (len(numbers), DOCUMENT_WORDS), np.random.default_rng(int(numbers[0]))
    topics = np.where(numbers < HUB_DOCUMENTS, 0, 1 + numbers // TOPIC_DOCUMENTS)[:, None]
    of_topic = _word(topics, random.integers(0, TOPIC_WORDS, shape))
    of_field = _word(-1 - topics // FIELD_TOPICS, random.integers(0, FIELD_WORDS, shape))
    of_all = (WORDS * random.random(shape) ** 3).astype(np.int64)  # some are frequent
    share = random.random(shape)
    return np.where(share < TOPIC_SHARE, of_topic, np.where(share < TOPIC_SHARE + FIELD_SHARE, of_field, of_all))


def _word(group: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Return one of a group's words, int64: a hash of group and number, so that groups are independent of each other."""
    mixed = (group * 64 + number).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xD6E8FEB86659FD93)
    return ((mixed >> np.uint64(32)) % np.uint64(WORDS)).astype(np.int64)


def _text(words: np.ndarray) -> str:
    return " ".join(f"w{word:x}" for word in words.tolist())


def write_encoder(folder: Path) -> None:
    """Write a static encoder in the format of model2vec: a table of random vectors of the words."""
    import tokenizers
    from safetensors.numpy import save_file

    folder.mkdir()
    model = tokenizers.models.WordLevel({f"w{word:x}": word for word in range(WORDS)} | {"[UNK]": WORDS}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    table = np.random.default_rng(0).standard_normal((WORDS + 1, DIMENSION), np.float32)
    save_file({"embeddings": table}, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps({"model_type": "model2vec", "normalize": True}))


def write_synthetic(corpus: Path, out: Path) -> None:
    """Write documents in the format of `synthesize`, a quarter as many as there are unique ones, each with a seed."""
    prepared = PreparedCorpus(corpus)
    tokenizer, seeds = prepared.tokenizer, np.arange(0, len(prepared.unique), 4)

    def body(context: StageContext) -> None:
        writer = CorpusWriter(context.directory, tokenizer.vocabulary_size)
        for first in range(0, len(seeds), BATCH):
            own = seeds[first : first + BATCH]
            texts = list(map(_text, _document_words(own + 10**9)))
            ids = [[tokenizer.begin, *tokens, tokenizer.end] for tokens in tokenizer.encode_batch(texts)]
            writer.add_batch(*join_ids(ids), **_columns(own, texts))
        writer.close()

    run_stage("synthesize", out, config={}, inputs={"corpus": corpus}, body=body, console=Console(quiet=True))


def _columns(seeds: np.ndarray, texts: list[str]) -> dict[str, Any]:
    import pyarrow as pa

    return {
        "ids": pa.array([f"synthetic/{seed}/0" for seed in seeds.tolist()]),
        "sources": pa.repeat("synthetic", len(seeds)),
        "text_bytes": np.array([len(text) for text in texts]),
        "seed": seeds,
        "sample": np.zeros(len(seeds), np.int64),
        "stop": pa.repeat("end", len(seeds)),
        "mean_log_probability": np.full(len(seeds), -1.0),
    }
