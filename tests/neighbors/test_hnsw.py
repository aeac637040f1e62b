"""A saved index: written completely or not at all, and not loaded once it is damaged."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from clustered import clustered_vectors

from sbp_fast.errors import UserError
from sbp_fast.neighbors.hnsw import HnswIndex

VECTORS = clustered_vectors(600)
IDS = 10 * np.arange(600)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index") / "part.hnsw"
    HnswIndex.build(VECTORS, IDS, m=8, ef_construction=50, seed=0).save(path)
    return path


def test_loaded_index_answers_as_the_saved_one(saved: Path) -> None:
    loaded = HnswIndex.load(saved)
    assert (len(loaded), loaded.dimension) == (600, 32)
    ids, similarities = loaded.search(VECTORS[:50], 5, ef_search=64, threads=1)
    built = HnswIndex.build(VECTORS, IDS, m=8, ef_construction=50, seed=0)
    built_ids, built_similarities = built.search(VECTORS[:50], 5, ef_search=64, threads=2)
    assert (ids == built_ids).all() and (similarities == built_similarities).all()
    assert (ids[:, 0] == IDS[:50]).mean() > 0.95
    assert np.abs(similarities - np.einsum("nd,nkd->nk", VECTORS[:50], VECTORS[ids // 10])).max() < 1e-5
    assert loaded.search(VECTORS[:1], 10_000, ef_search=10, threads=1)[0].shape == (1, 600)


def test_same_vectors_give_the_same_file(saved: Path, tmp_path: Path) -> None:
    HnswIndex.build(VECTORS, IDS, m=8, ef_construction=50, seed=0).save(tmp_path / "part.hnsw")
    assert (tmp_path / "part.hnsw").read_bytes() == saved.read_bytes()


def test_vectors_added_to_a_loaded_index_give_the_same_file_at_each_run(saved: Path, tmp_path: Path) -> None:
    more = clustered_vectors(1500, seed=50)
    for name in ("first", "second"):
        grown = HnswIndex.load(saved)
        grown.add(more, 6000 + np.arange(1500))
        grown.save(tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    loaded = HnswIndex.load(tmp_path / "first")
    blocks = list(loaded.items())
    assert len(blocks) > 1 and np.concatenate([ids for ids, _ in blocks]).tolist() == [*IDS, *range(6000, 7500)]
    assert (np.concatenate([vectors for _, vectors in blocks]) == np.concatenate([VECTORS, more])).all()
    own = np.concatenate([loaded.search(part, 1, ef_search=128, threads=1)[0] for part in (VECTORS, more)])[:, 0]
    assert (own == [*IDS, *range(6000, 7500)]).mean() > 0.99


def test_load_of_a_damaged_file_is_refused(saved: Path, tmp_path: Path) -> None:
    content, generator = saved.read_bytes(), np.random.default_rng(0)
    path = tmp_path / "part.hnsw"
    path.with_name("part.hnsw.json").write_bytes(saved.with_name("part.hnsw.json").read_bytes())
    for offset in generator.integers(len(content), size=40).tolist():
        flipped = bytearray(content)
        flipped[offset] ^= 1 << generator.integers(8)
        for damaged in (bytes(flipped), content[:offset], content + content[offset : offset + 1]):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=r"part.hnsw: damaged since it was written; rerun"):
                HnswIndex.load(path)
    path.unlink()
    with pytest.raises(UserError, match=r"there is no index; rerun pair with pair.save_index=true"):
        HnswIndex.load(path)


def test_save_into_a_missing_folder_or_a_full_device_raises(tmp_path: Path) -> None:
    index = HnswIndex.build(VECTORS, IDS, m=8, ef_construction=50, seed=0)
    with pytest.raises(FileNotFoundError):
        index.save(tmp_path / "nowhere" / "part.hnsw")
    program = (
        "import numpy as np; from pathlib import Path; from sbp_fast.neighbors.hnsw import HnswIndex\n"
        "vectors = np.random.default_rng(0).standard_normal((600, 32)).astype(np.float32)\n"
        "index = HnswIndex.build(vectors, np.arange(600), m=8, ef_construction=50, seed=0)\n"
        f"index.save(Path({str(tmp_path / 'part.hnsw')!r}))"
    )

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, 64 << 10))

    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        preexec_fn=small_files,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert "bytes were written" in done.stderr and done.returncode != 0, done.stderr
    assert not list(tmp_path.iterdir())
