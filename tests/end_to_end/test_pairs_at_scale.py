"""`pair` as a process of its own, over as many vectors as one machine joins at once and more."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.pairs import clustered
from sbp_fast.corpus.corpus_writer import CorpusWriter
from sbp_fast.corpus.tokenizer import train_tokenizer
from sbp_fast.pairs.vectors import write_vectors
from sbp_fast.progress import Console
from sbp_fast.stage import Manifest, Work, run_stage

DOCUMENTS, DIMENSION = 200_000, 384
MEMORY = 4 << 30


def write_inputs(directory: Path) -> None:
    """What `prepare` and `embed` would have written: short texts of random tokens, clustered vectors."""
    import torch

    def write_corpus(work: Work) -> None:
        train_tokenizer(["a few words"], 300).save(work.directory / "tokenizer.json")
        generator = np.random.default_rng(0)
        for part, documents in (("train", DOCUMENTS), ("heldout", 1)):
            writer = CorpusWriter(work.directory / part, 300)
            for number in range(documents):
                writer.add(generator.integers(3, 300, 40), id=str(number), source="random", text_bytes=1)
            writer.close()
        work.record(unique_documents=DOCUMENTS, embedded=False, sources={"random": DOCUMENTS})

    def write_all_vectors(work: Work) -> None:
        vectors = clustered(DOCUMENTS, torch.Generator().manual_seed(0)).numpy()
        for number, start in enumerate(range(0, DOCUMENTS, 50_000)):
            write_vectors(work.directory / f"vectors-{number:05d}.npy", vectors[start : start + 50_000], "float16")

    corpus, quiet = directory / "corpus", Console(quiet=True)
    settings = {"corpus": {"group_separator": "/"}}
    run_stage("prepare", corpus, config=settings, inputs={}, body=write_corpus, console=quiet)
    run_stage("embed", directory / "vectors", config={}, inputs={"corpus": corpus}, body=write_all_vectors, console=quiet)


def run_pair(directory: Path, out: Path, *settings: str) -> tuple[Manifest, int]:
    """The manifest, and the most bytes that the process had in memory."""
    (directory / "empty.toml").write_text("")
    inputs = ["--corpus", str(directory / "corpus"), "--vectors", str(directory / "vectors"), "--out", str(out)]
    command = [sys.executable, "-m", "sbp_fast", "pair", str(directory / "empty.toml"), "pair.similarity_low=0.75", *settings]
    process = subprocess.Popen([*command, *inputs], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return Manifest.load(out), usage.ru_maxrss << 10


@pytest.mark.slow
def test_pairing_200_000_vectors_takes_less_than_4_gib_and_cells_find_as_many(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    whole, peak = run_pair(tmp_path, tmp_path / "whole")
    counts = whole.counts
    print(f"peak {peak / 2**30:.2f} GiB, {whole.seconds:.0f} s, {counts['pairs']} pairs, recall {counts['recall']['recall']}")
    assert counts["join"] == {**counts["join"], "backend": "bucket", "cells": 1}
    assert counts["recall"]["recall"] >= 0.99 and counts["documents"] == DOCUMENTS
    assert 1 << 30 < peak < MEMORY
    routed, peak = run_pair(tmp_path, tmp_path / "routed", "pair.cell_documents=50000", "pair.memory_gib=0.25")
    recall = routed.counts["recall"]["recall"]
    print(f"in {routed.counts['join']['cells']} cells: peak {peak / 2**30:.2f} GiB, {routed.seconds:.0f} s, recall {recall}")
    assert recall >= max(0.99, counts["recall"]["recall"] - 0.01) and peak < MEMORY / 2
