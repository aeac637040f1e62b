"""`pair` as a process of its own: killed again and again, and over as many vectors as one self-join takes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bench.pairs import clustered
from sbp_fast.config import EmbedConfig
from sbp_fast.data.token_shards.writer import CorpusWriter
from sbp_fast.data.tokenizer import train_tokenizer
from sbp_fast.neighbors.vectors import write_vectors
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage

DOCUMENTS, DIMENSION = 200_000, 384
MEMORY = 4 << 30
KILLS = 12


def write_inputs(directory: Path, count: int) -> None:
    """What `prepare` and `embed` would have written: short texts of random tokens, clustered vectors."""
    import torch

    def write_corpus(context: StageContext) -> None:
        train_tokenizer(["a few words"], 300).save(context.directory / "tokenizer.json")
        generator = np.random.default_rng(0)
        for part, documents in (("train", count), ("heldout", 1)):
            writer = CorpusWriter(context.directory / part, 300)
            for number in range(documents):
                writer.add(generator.integers(3, 300, 40), id=str(number), source="random", text_bytes=1)
            writer.close()
        context.record(unique_documents=count, embedded=False, sources={"random": count})

    def write_all_vectors(context: StageContext) -> None:
        vectors = clustered(count, torch.Generator().manual_seed(0)).numpy()
        for number, start in enumerate(range(0, count, 50_000)):
            write_vectors(context.directory / f"vectors-{number:05d}.npy", vectors[start : start + 50_000], "float16")

    corpus, quiet = directory / "corpus", Console(quiet=True)
    settings = {"corpus": {"group_separator": "/"}}
    run_stage("prepare", corpus, config=settings, inputs={}, body=write_corpus, console=quiet)
    embedding = {"embed": EmbedConfig().model_dump(mode="json")}
    run_stage(
        "embed", directory / "vectors", config=embedding, inputs={"corpus": corpus}, body=write_all_vectors, console=quiet
    )


def start(directory: Path, out: Path, *settings: str) -> subprocess.Popen[bytes]:
    (directory / "empty.toml").write_text("")
    inputs = ["--corpus", str(directory / "corpus"), "--vectors", str(directory / "vectors"), "--out", str(out)]
    command = [sys.executable, "-m", "sbp_fast", "pair", str(directory / "empty.toml"), "pair.similarity_low=0.75", *settings]
    return subprocess.Popen([*command, *inputs], stdout=subprocess.DEVNULL)


def run_pair(directory: Path, out: Path, *settings: str) -> tuple[Manifest, int]:
    """The manifest, and the most bytes that the process had in memory."""
    process = start(directory, out, *settings)
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return Manifest.load(out), usage.ru_maxrss << 10


@pytest.mark.slow
def test_pair_of_200_000_vectors_takes_less_than_4_gib_and_partitions_find_as_many(tmp_path: Path) -> None:
    write_inputs(tmp_path, DOCUMENTS)
    whole, peak = run_pair(tmp_path, tmp_path / "whole")
    counts = whole.counts
    print(f"peak {peak / 2**30:.2f} GiB, {whole.seconds:.0f} s, {counts['pairs']} pairs, recall {counts['recall']['recall']}")
    assert counts["self_join"] == {**counts["self_join"], "backend": "ivf", "partitions": 1}
    assert counts["recall"]["recall"] >= 0.99 and counts["documents"] == DOCUMENTS
    assert 1 << 30 < peak < MEMORY
    partitioned, peak = run_pair(tmp_path, tmp_path / "partitioned", "pair.partition_documents=50000", "pair.memory_gib=0.25")
    recall = partitioned.counts["recall"]["recall"]
    number = partitioned.counts["self_join"]["partitions"]
    print(f"in {number} partitions: peak {peak / 2**30:.2f} GiB, {partitioned.seconds:.0f} s, recall {recall}")
    assert recall >= max(0.99, counts["recall"]["recall"] - 0.01) and peak < MEMORY / 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ivf", "hnsw"])
def test_pair_killed_at_random_gives_the_same_files(backend: str, tmp_path: Path) -> None:
    write_inputs(tmp_path, 3000)
    settings = (f"pair.backend={backend}", "pair.partition_documents=800", "pair.memory_gib=0.004", "threads=1")
    whole, _ = run_pair(tmp_path, tmp_path / "whole", *settings)
    assert whole.counts["self_join"]["partitions"] > 10
    dice, killed, partial = random.Random(0), 0, tmp_path / "broken.partial"
    for _ in range(100):
        begun, patience = len(files(partial)), dice.randint(1, 9)
        process = start(tmp_path, tmp_path / "broken", *settings)
        while process.poll() is None and (killed == KILLS or len(files(partial)) < begun + patience):
            time.sleep(0.005)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
    assert process.returncode == 0 and killed >= KILLS // 2
    broken = Manifest.load(tmp_path / "broken")
    assert broken.files == whole.files and broken.counts == whole.counts and broken.fingerprint == whole.fingerprint


def files(directory: Path) -> list[str]:
    return [name for _, _, names in os.walk(directory) for name in names]
