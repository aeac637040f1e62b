"""Crafted index files, whose checksums are right: each is refused, or searched without a crash."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sbp_fast.errors import UserError
from sbp_fast.neighbors.hnsw import HnswIndex, metadata_path
from sbp_fast.neighbors.hnsw_file import HEADER
from sbp_fast.pipeline.files import hash_file, read_json, write_json

DOCUMENTS, DIMENSION = 300, 8
SEARCH = """
import sys
from pathlib import Path
import numpy as np
from sbp_fast.errors import UserError
from sbp_fast.neighbors.hnsw import HnswIndex
refused = 0
for path in sorted(Path(sys.argv[1]).glob("*.hnsw")):
    try:
        index = HnswIndex.load(path)
        index.search(np.eye(8, dtype=np.float32), 5, ef_search=50, threads=1)
        index.add(-np.eye(8, dtype=np.float32), np.arange(10**6, 10**6 + 8))
    except UserError as error:
        assert path.name in str(error) and "\\n" not in str(error)
        refused += 1
print(refused)
"""


def save(path: Path, documents: int = DOCUMENTS) -> bytes:
    vectors = np.random.default_rng(0).standard_normal((documents, DIMENSION)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    HnswIndex.build(vectors, np.arange(documents), m=4, ef_construction=20, seed=1).save(path)
    return path.read_bytes()


def seal(path: Path, content: bytes) -> None:
    """Write an index with checksums that belong to it, as its author would."""
    path.write_bytes(content)
    metadata = {"documents": DOCUMENTS, "dimension": DIMENSION, "bytes": len(content), "xxh3": hash_file(path)}
    write_json(metadata_path(path), metadata)


@pytest.mark.parametrize("documents", [1, 2, DOCUMENTS])
def test_index_that_was_saved_is_loaded(documents: int, tmp_path: Path) -> None:
    save(tmp_path / "a.hnsw", documents)
    assert len(HnswIndex.load(tmp_path / "a.hnsw")) == documents


@pytest.mark.parametrize("name", [name for name in HEADER.names or () if name not in ("multiplier", "ef_construction")])
def test_index_with_another_number_in_its_header_is_refused(name: str, tmp_path: Path) -> None:
    content = bytearray(save(tmp_path / "a.hnsw"))
    header = np.frombuffer(content, HEADER, 1)
    header[name] += 1
    seal(tmp_path / "a.hnsw", content)
    with pytest.raises(UserError, match=r"a\.hnsw: is no index that sbp-fast wrote"):
        HnswIndex.load(tmp_path / "a.hnsw")


@pytest.mark.parametrize("files", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_crafted_index_files_crash_nothing(files: int, tmp_path: Path) -> None:
    content, dice = save(tmp_path / "whole.hnsw"), random.Random(0)
    for number in range(files):
        crafted = bytearray(content)
        for _ in range(dice.randint(1, 4)):
            at = 4 * dice.randrange(len(content) // 4 if dice.random() < 0.7 else HEADER.itemsize // 4)
            crafted[at : at + 4] = dice.choice([b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", dice.randbytes(4), b"\0\0\0\0"])
        seal(tmp_path / f"{number:04d}.hnsw", bytes(crafted[: dice.choice([None, None, None, -4, len(content) // 2])]))
    command = [sys.executable, "-c", SEARCH, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-1000:]
    assert int(done.stdout) > files // 3


@pytest.mark.parametrize("change", [{"documents": None}, {"dimension": "8"}, {"dimension": -1}])
def test_index_with_unusable_metadata_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    save(tmp_path / "a.hnsw")
    write_json(metadata_path(tmp_path / "a.hnsw"), read_json(metadata_path(tmp_path / "a.hnsw")) | change)
    with pytest.raises(UserError, match=r"a\.hnsw\.json: is no description of an index"):
        HnswIndex.load(tmp_path / "a.hnsw")
