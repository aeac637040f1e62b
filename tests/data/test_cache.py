"""Blocks of remote corpora kept on local disk."""

import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import xxhash

from sbp_fast.data.token_shards.cache import BlockCache, open_cache
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.data.token_shards.writer import CorpusWriter
from sbp_fast.errors import TransientError, UserError

LIMIT = 100_000


def cached_files(directory: Path) -> dict[Path, int]:
    """The files with blocks in a cache, and their sizes; some may go while we look."""
    sizes = {}
    for path in directory.glob("*/*"):
        try:
            sizes[path] = path.stat().st_size
        except FileNotFoundError:
            continue
    return sizes


def held_at_once(directory: Path) -> int:
    """What the files take while no process makes room, so that none is counted that another has replaced."""
    with open(directory / "size", "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return sum(cached_files(directory).values())


def block(number: int, size: int = 1000) -> tuple[int, bytes]:
    """A block of its own, and its checksum."""
    stored = np.random.default_rng(number).bytes(size)
    return xxhash.xxh3_64_intdigest(stored), stored


@pytest.fixture(params=["none", "zstd"])
def remote(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Two shards of 320 and 160 tokens in 8 blocks behind a URL, and a cache asked for."""
    writer = CorpusWriter(tmp_path / "corpus", 300, 300, compression=request.param, block_tokens=64)
    for number in range(12):
        tokens = np.random.default_rng(number).integers(0, 300, 40)
        writer.add(tokens, id=f"d/{number}", source="s", text_bytes=1)
    writer.close()
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "corpus"), "/cached", recursive=True)
    monkeypatch.setenv("SBP_FAST_CACHE", str(tmp_path / "cache"))
    yield "memory://cached"
    memory.rm("/cached", recursive=True)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The token files that the store is asked for, once for each block."""
    memory, names = type(fsspec.filesystem("memory")), []
    cat_file = memory.cat_file

    def spy(self: object, path: str, start: int | None = None, end: int | None = None, **options: object) -> bytes:
        names.extend([Path(path).name] * ("tokens" in path))
        return cat_file(self, path, start, end, **options)

    monkeypatch.setattr(memory, "cat_file", spy)
    return names


def everything(corpus: Corpus) -> list[int]:
    return corpus.slice(0, corpus.tokens).tolist()


def test_each_block_is_fetched_once_from_the_store_for_all_readers(
    remote: str, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = everything(Corpus(tmp_path / "corpus"))
    assert everything(Corpus(remote)) == local and len(asked) == 8
    again = Corpus(remote)  # as another process, or after a restart
    assert everything(again) == local and np.concatenate(list(again.read())).tolist() == local and len(asked) == 8
    files = cached_files(tmp_path / "cache")
    assert len(files) == 8 and sum(files.values()) == sum(
        file.stat().st_size for file in (tmp_path / "corpus").glob("tokens-*.bin")
    )
    again.verify()  # looks at the store itself
    monkeypatch.delenv("SBP_FAST_CACHE")
    assert everything(Corpus(remote)) == local and len(asked) == 16
    assert not list((tmp_path / "corpus").glob("cache*"))


def test_a_local_corpus_needs_no_cache(tmp_path: Path, remote: str) -> None:
    everything(Corpus(tmp_path / "corpus"))
    assert not (tmp_path / "cache").exists()


def test_a_damaged_cache_file_is_fetched_anew_and_damage_in_the_store_is_named(
    remote: str, asked: list[str], tmp_path: Path
) -> None:
    local = everything(Corpus(remote))
    generator = np.random.default_rng(0)
    for path in cached_files(tmp_path / "cache"):
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[generator.integers(len(content))] ^= 1 << generator.integers(8)
        for damaged in (bytes(flipped), content[:-1], content + b"1", b""):
            asked.clear()
            path.write_bytes(damaged)
            assert everything(Corpus(remote)) == local and len(asked) == 1
            assert path.read_bytes() == content
    memory = fsspec.filesystem("memory")
    stored = bytearray(memory.cat_file("/cached/tokens-00001.bin"))
    stored[-1] ^= 1
    memory.pipe("/cached/tokens-00001.bin", bytes(stored))
    assert everything(Corpus(remote)) == local
    with pytest.raises(UserError, match=r"memory://cached/tokens-00001.bin: block \d"):
        Corpus(remote).verify()
    for path in cached_files(tmp_path / "cache"):
        path.unlink()
    with pytest.raises(UserError, match=r"memory://cached/tokens-00001.bin: block \d"):
        everything(Corpus(remote))
    assert len(cached_files(tmp_path / "cache")) == 7


def test_a_damaged_block_counts_as_absent(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, LIMIT)
    cache.keep(*block(0))
    (path,) = cached_files(tmp_path)
    path.write_bytes(bytes(1000))
    assert cache.read(block(0)[0], 1000) is None and not path.exists()


def test_the_least_recently_used_are_evicted_above_the_bound(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, LIMIT)
    for number in range(100):
        cache.keep(*block(number))
    assert sum(cached_files(tmp_path).values()) == LIMIT
    for number in range(20):
        assert cache.read(block(number)[0], 1000) == block(number)[1]
        time.sleep(0.001)
    cache.keep(*block(100))
    sizes = cached_files(tmp_path)
    assert sum(sizes.values()) == 0.9 * LIMIT
    there = [number for number in range(101) if cache.read(block(number)[0], 1000) is not None]
    assert there == [*range(20), *range(31, 101)]
    assert sum(cached_files(tmp_path).values()) == 0.9 * LIMIT
    BlockCache(tmp_path, LIMIT // 2)  # a lower bound holds from the next start on
    assert sum(cached_files(tmp_path).values()) <= LIMIT // 2


def test_the_size_is_right_after_others_removed_or_left_files(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, LIMIT)
    for number in range(90):
        cache.keep(*block(number))
    for path in list(cached_files(tmp_path))[:80]:
        path.unlink()
    for number in range(100, 180):
        cache.keep(*block(number))
    assert (
        sum(cached_files(tmp_path).values()) == 90 * 1000
    )  # nothing had to go: they were counted when the bound seemed passed
    (tmp_path / "size").write_text("")  # a kill in the middle of writing it
    (tmp_path / "aa/left.tmp").parent.mkdir(exist_ok=True)
    (tmp_path / "aa/left.tmp").write_bytes(bytes(50_000))
    os.utime(tmp_path / "aa/left.tmp", (0, 0))
    cache.keep(*block(200))
    assert not (tmp_path / "aa/left.tmp").exists() and sum(cached_files(tmp_path).values()) <= LIMIT


WORKER = """
import random, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_cache import LIMIT, BlockCache, block
cache, dice = BlockCache(Path(sys.argv[1]), LIMIT), random.Random(int(sys.argv[2]))
blocks = [block(number) for number in range(300)]
for _ in range(1000):
    xxh3, stored = blocks[dice.randrange(300)]
    found = cache.read(xxh3, len(stored))
    assert found is None or found == stored
    if found is None:
        cache.keep(xxh3, stored)
"""


def start(program: str, *arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program.format(tests=str(Path(__file__).parent)), *arguments]
    return subprocess.Popen(command, env=environment)


def test_the_bound_holds_for_processes_that_share_a_cache(tmp_path: Path) -> None:
    workers = [start(WORKER, str(tmp_path), str(number)) for number in range(3)]
    most = 0
    while any(worker.poll() is None for worker in workers):
        most = max(most, held_at_once(tmp_path))
        time.sleep(0.01)
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert 0.5 * LIMIT < most <= LIMIT + 3 * 1000  # a block for each that is just writing one
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_kill_during_a_write_leaves_no_usable_file(tmp_path: Path) -> None:
    program = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_cache import LIMIT, BlockCache, block
cache = BlockCache(Path(sys.argv[1]), LIMIT)
os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
cache.keep(*block(0))
"""
    assert start(program, str(tmp_path)).wait() == -signal.SIGKILL
    (left,) = cached_files(tmp_path)
    assert left.suffix == ".tmp"
    cache = BlockCache(tmp_path, LIMIT)
    assert cache.read(block(0)[0], 1000) is None
    for number in range(101):
        cache.keep(*block(number))
    assert not left.exists()  # went with the longest unused
    assert cache.read(block(100)[0], 1000) == block(100)[1]


def test_a_cache_that_cannot_be_used_is_refused_in_one_line(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for variable, value, words in (
        ("SBP_FAST_CACHE", str(tmp_path / "file"), "file: does not serve as a cache: File exists; give SBP_FAST_CACHE a dir"),
        ("SBP_FAST_CACHE_GIB", "much", "SBP_FAST_CACHE_GIB = much: is no number of GiB; set it to"),
        ("SBP_FAST_CACHE_GIB", "-1", "SBP_FAST_CACHE_GIB = -1: is no number of GiB"),
        ("SBP_FAST_CACHE_GIB", "nan", "SBP_FAST_CACHE_GIB = nan: is no number of GiB"),
        ("SBP_FAST_CACHE_GIB", "inf", "SBP_FAST_CACHE_GIB = inf: is no number of GiB"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            with pytest.raises(UserError, match=words):
                Corpus(remote)
    monkeypatch.setenv("SBP_FAST_CACHE_GIB", "0.5")
    cache = open_cache()
    assert cache is not None and cache._limit == 1 << 29


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, LIMIT)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(TransientError, match="does not serve as a cache: File too large; give SBP_FAST_CACHE"):
            cache.keep(*block(0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not cached_files(tmp_path) and cache.read(block(0)[0], 1000) is None
