"""`prepare` as a process of its own: killed again and again, and over a million documents."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.pipeline.manifest import Manifest

KILLS = 12
MEMORY = 2 << 30
# as the command line, in parts small enough that a small corpus has many
COMMAND = """
import sys
from sbp_fast.data import preparation
from sbp_fast.cli import main
if __name__ == "__main__":
    preparation.PARTITION_BYTES = int(sys.argv.pop(1))
    main()
"""


def start(script: Path, part_bytes: int, documents: Path, out: Path, workers: int) -> subprocess.Popen[bytes]:
    script.write_text(COMMAND)
    settings = [f"corpus.path={documents}", "corpus.vocabulary_size=400", f"corpus.workers={workers}"]
    (script.parent / "empty.toml").write_text("")
    command = ["prepare", str(script.parent / "empty.toml"), *settings, "--out", str(out)]
    return subprocess.Popen([sys.executable, str(script), str(part_bytes), *command], stdout=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_prepare_killed_at_random_gives_the_same_files(tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    for file in range(4):
        lines = (f"Document {i} of file {file}: {i**5} {i**3 % 1009} and so on." for i in range(4000))
        (folder / f"{file}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    script = tmp_path / "script.py"
    assert start(script, 100_000, folder, tmp_path / "whole", 1).wait() == 0
    dice, killed = random.Random(0), 0
    partial = tmp_path / "broken.partial"
    for _ in range(100):
        begun, patience = len(files(partial)), dice.randint(1, 12)
        process = start(script, 100_000, folder, tmp_path / "broken", workers)
        while process.poll() is None and (killed == KILLS or len(files(partial)) < begun + patience):
            time.sleep(0.005)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)  # of the workers none is told
        process.wait()
        killed += 1
    assert process.returncode == 0 and killed >= KILLS // 2
    whole, broken = (Manifest.load(tmp_path / name) for name in ("whole", "broken"))
    assert broken.files == whole.files and broken.counts == whole.counts and broken.fingerprint == whole.fingerprint


def files(directory: Path) -> list[str]:
    return [name for _, _, names in os.walk(directory) for name in names]


@pytest.mark.slow
def test_prepare_of_a_million_documents_takes_bounded_memory(tmp_path: Path) -> None:
    documents, words = tmp_path / "documents.jsonl", np.array([f"word{number}" for number in range(5000)])
    generator = np.random.default_rng(0)
    with documents.open("w") as file:
        for number in range(1_000_000):
            file.write(json.dumps({"id": f"d-{number}", "text": " ".join(words[generator.integers(0, 5000, 3)])}) + "\n")
    process = start(tmp_path / "script.py", 256 << 20, documents, tmp_path / "out", 2)
    peak = 0
    while process.poll() is None:
        peak = max(peak, family_memory(process.pid))
        time.sleep(0.05)
    assert process.returncode == 0
    corpus = PreparedCorpus(tmp_path / "out")
    dropped = corpus.counts["duplicates_dropped"] + corpus.counts["heldout_duplicates_dropped"]
    print(f"peak memory of all processes: {peak / 2**20:.0f} MiB, {Manifest.load(tmp_path / 'out').seconds:.0f} s")
    assert len(corpus.train) + len(corpus.heldout) + dropped >= 1_000_000 - len(corpus.heldout)
    assert len(corpus.train) > 900_000
    assert 50 << 20 < peak < MEMORY


def family_memory(process: int) -> int:
    """Resident bytes of a process and its children."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid=,rss="], capture_output=True, text=True, check=True).stdout
    rows = [tuple(map(int, line.split())) for line in listing.splitlines()]
    return sum(rss << 10 for pid, parent, rss in rows if process in (pid, parent))
