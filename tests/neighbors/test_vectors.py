from pathlib import Path

import numpy as np
import pytest
from clustered import as_stage, unit_vectors

from sbp_fast.errors import UserError
from sbp_fast.neighbors.vectors import Storage, Vectors, similarities


@pytest.mark.parametrize(
    ("storage", "bytes_each", "tolerance"), [("float32", 4, 1e-7), ("float16", 2, 3e-4), ("int8", 1, 5e-3)]
)
def test_rows_come_back_in_any_order_at_unit_length(
    storage: Storage, bytes_each: int, tolerance: float, tmp_path: Path
) -> None:
    matrix = unit_vectors(500, 64)
    vectors = as_stage(matrix, tmp_path / "vectors", shard=77, storage=storage)
    assert (len(vectors), vectors.dimension) == (500, 64)
    rows = np.random.default_rng(0).integers(500, size=900)
    assert np.abs(vectors[rows] - matrix[rows]).max() <= tolerance
    assert np.abs(np.linalg.norm(vectors[rows].astype(np.float64), axis=1) - 1).max() < 1e-6
    assert (vectors[rows] == vectors[np.arange(500)][rows]).all()
    assert vectors[np.zeros(0, np.int64)].shape == (0, 64)
    few = vectors.select(np.array([400, 3, 150]))
    assert len(few) == 3 and (few[np.array([1, 2])] == vectors[np.array([3, 150])]).all()
    size = sum(path.stat().st_size for path in (tmp_path / "vectors").glob("vectors-*.npy"))
    assert size == 500 * 64 * bytes_each + 7 * 128  # a header of 128 bytes a shard


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not list a process's open files")
def test_shards_beyond_those_mapped_at_once_are_read_and_release_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sbp_fast.neighbors.vectors.MAPPED_FILES", 3)
    matrix, before = unit_vectors(300, 16), len(list(Path("/proc/self/fd").iterdir()))
    vectors = as_stage(matrix, tmp_path / "vectors", shard=5)
    rows = np.random.default_rng(0).permutation(300)
    assert np.abs(vectors[rows] - matrix[rows]).max() <= 1e-7
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 3


def test_similarities_are_inner_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbp_fast.neighbors.vectors.READ_BLOCK", 64)
    matrix = unit_vectors(200, 32)
    vectors = as_stage(matrix, tmp_path / "vectors")
    first, second = np.random.default_rng(1).integers(200, size=(2, 1000))
    found = similarities(vectors, first, second)
    assert np.abs(found - (matrix[first] * matrix[second]).sum(axis=1)).max() < 1e-6
    assert (found == similarities(vectors, second, first)).all()


def test_a_flipped_byte_is_found_and_named(tmp_path: Path) -> None:
    as_stage(unit_vectors(100, 8), tmp_path / "vectors", shard=40)
    path = tmp_path / "vectors/vectors-00001.npy"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"vectors-00001.npy: missing or damaged"):
        Vectors(tmp_path / "vectors")
