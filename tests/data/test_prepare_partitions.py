"""`prepare` in partitions: the same bytes from any number of processes, from partitions of any size, and after any kill."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sbp_fast.config import CorpusConfig, RunConfig
from sbp_fast.data import input_splits, preparation
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.pipeline import stage
from sbp_fast.pipeline.executors.local import LocalWorkers
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages.prepare import prepare

QUIET = Console(quiet=True)
FILES, DOCUMENTS = 3, 40
LATE = "Last in the first file, and first in the last."


@pytest.fixture
def input(tmp_path: Path) -> Path:
    """Three files of different kinds, with duplicates within and between them, and a document long enough to be cut."""
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(FILES):
        texts = [f"Document {i} of file {number}: {i * i * i}, {i % 7} ..." for i in range(DOCUMENTS)]
        texts += ["The same in every file.", f"Long in {number}. " * 40]
        texts = {0: [*texts, LATE], 1: texts, 2: [LATE, *texts]}[number]
        lines = "".join(json.dumps({"text": text, "source": "ab"[number % 2]}) + "\n" for text in texts).encode()
        path = folder / (f"{number}.jsonl.gz" if number == 1 else f"{number}.jsonl")
        path.write_bytes(gzip.compress(lines, mtime=0) if number == 1 else lines)
    return folder


@pytest.fixture(autouse=True)
def _small_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "PARTITION_BYTES", 12_000)


def configure(path: Path | str, **corpus: Any) -> RunConfig:
    values = {"path": str(path), "vocabulary_size": 270, "unique_share": 0.25, "passage_characters": 200, **corpus}
    return RunConfig(corpus=CorpusConfig(**values))


def test_prepare_writes_the_same_bytes_with_any_number_of_processes(input: Path, tmp_path: Path) -> None:
    made = [prepare(configure(input, workers=workers), tmp_path / str(workers), console=QUIET) for workers in (1, 2, 3)]
    assert made[0].files == made[1].files == made[2].files and made[0].fingerprint == made[2].fingerprint
    assert len([name for name in made[0].files if name.startswith("train/tokens")]) > 3
    assert not [path for path in (tmp_path / "2").rglob("*") if "scratch" in path.name]


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(partition_bytes=st.integers(1_000, 100_000), small=st.integers(500, 50_000), data=st.data())
def test_the_order_does_not_depend_on_partition_sizes(
    input: Path, tmp_path_factory: pytest.TempPathFactory, partition_bytes: int, small: int, data: st.DataObject
) -> None:
    out = tmp_path_factory.mktemp("out")
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("whole", "cut"):
            prepare(configure(input, compression="zstd" if name == "cut" else "none", workers=1), out / name, console=QUIET)
            corpus = PreparedCorpus(out / name)
            tokens = [corpus.train[i].tolist() for i in range(len(corpus.train))]
            counts = {key: value for key, value in corpus.counts.items() if not key.endswith("_seconds")}
            found.append((tokens, list(corpus.train.ids), list(corpus.heldout.ids), counts, corpus.tokenizer.to_json()))
            patch.setattr(preparation, "PARTITION_BYTES", partition_bytes)
            patch.setattr(preparation, "SMALL_PARTITION_BYTES", small)
    assert found[0] == found[1]
    assert found[0][3]["duplicates_dropped"] + found[0][3]["heldout_duplicates_dropped"] >= 2
    assert len(found[0][1]) + len(found[0][2]) == FILES * (DOCUMENTS + found[0][3]["passages_cut"] // FILES) + 2
    stay = {id for id in (*found[0][1], *found[0][2]) if id.split("/")[0] in (f"0.jsonl:{DOCUMENTS + 3}", "2.jsonl:1")}
    assert stay == {f"0.jsonl:{DOCUMENTS + 3}"}  # of duplicates the first that was read


class Killed(BaseException):
    pass


def test_a_kill_at_any_durable_step_resumes_to_the_same_bytes(
    input: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, calls = os.fsync, [0]
    config = configure(input, workers=1, on_error="skip")
    (input / "0.jsonl").open("a").write("damaged\n")

    def run(out: Path, last: float) -> Manifest | None:
        def count(descriptor: int) -> None:
            calls[0] += 1
            if calls[0] > last:
                raise Killed
            fsync(descriptor)

        calls[0] = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", count)
            try:
                return prepare(config, out, console=QUIET)
            except Killed:
                return None

    whole = run(tmp_path / "whole", float("inf"))
    assert whole is not None
    steps = calls[0]
    for step in range(1, steps, max(1, steps // 9)):
        out = tmp_path / f"out{step}"
        assert run(out, step) is None
        again = run(out, float("inf"))
        assert again is not None and again.files == whole.files and again.counts == whole.counts


def test_a_kill_before_the_manifest_repeats_no_work(input: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(input, workers=1)
    whole = prepare(config, tmp_path / "whole", console=QUIET)

    def kill(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(stage, "_finish", kill)
        with pytest.raises(Killed):
            prepare(config, tmp_path / "out", console=QUIET)
    monkeypatch.setattr(LocalWorkers, "run", kill)
    made = prepare(config, tmp_path / "out", console=QUIET)
    assert made.files == whole.files and made.counts == whole.counts
    assert not (tmp_path / "out/complete.json").exists()


def test_finished_chunks_and_partitions_are_not_written_again(
    input: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, begun, renamed = os.replace, [True], []

    def kill_late(source: Path, target: Path) -> None:
        name = Path(target).name
        if begun[0] and name == "partition-00002.json":
            raise Killed
        renamed.append(name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", kill_late)
    with pytest.raises(Killed):
        prepare(configure(input, workers=1), tmp_path / "out", console=QUIET)
    begun[0] = False
    before, renamed = set(renamed), []
    prepare(configure(input, workers=1), tmp_path / "out", console=QUIET)
    written = [name for name in renamed if name.startswith(("chunk", "file", "partition", "tokens"))]
    assert {"tokens-00001-00000.bin", "partition-00001.json", "chunk-000000-000000.arrow"} <= before
    assert not {name for name in written if not name.startswith("tokens-00002")} & before


def test_a_failing_store_stops_prepare_and_keeps_the_files_read_before(
    input: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(input), "/shuffled", recursive=True)
    monkeypatch.setattr(input_splits, "GROUP_BYTES", 0)  # small files are read again in groups
    config = configure("memory://shuffled", on_error="skip", workers=1)
    whole = prepare(config, tmp_path / "whole", console=QUIET)
    opened, read = type(memory).open, []

    def fail(self: Any, path: str, *arguments: Any, **options: Any) -> Any:
        read.append(path)
        if path.endswith("2.jsonl"):
            raise RuntimeError("the store does not answer")
        return opened(self, path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "open", fail)
        with pytest.raises(UserError, match=r"2\.jsonl: cannot be read: the store does not answer"):
            prepare(config, tmp_path / "out", console=QUIET)
        assert len(read) == 3
        with pytest.raises(UserError, match="does not answer"):
            prepare(config, tmp_path / "out", console=QUIET)
        assert len(read) == 4  # the files before are not read again
    assert prepare(config, tmp_path / "out", console=QUIET).files == whole.files
    memory.rm("/shuffled", recursive=True)


def test_on_error_skip_counts_and_lists_unusable_records(input: Path, tmp_path: Path) -> None:
    path = input / "0.jsonl"
    whole = prepare(configure(input), tmp_path / "whole", console=QUIET)
    good = path.read_bytes()
    path.write_bytes(b"not JSON\n" + good + b'{"text": ""}\n')
    (input / "2.jsonl.gz").write_bytes(gzip.compress(good)[:-30])
    with pytest.raises(UserError, match="line 1: malformed JSON"):
        prepare(configure(input, workers=2), tmp_path / "stopped", console=QUIET)
    assert not list(tmp_path.glob("stopped*"))
    made = prepare(configure(input, on_error="skip", workers=2), tmp_path / "skipped", console=QUIET)
    listed = [json.loads(line) for line in (tmp_path / "skipped/skipped.jsonl").read_text().splitlines()]
    assert [entry["where"] for entry in listed] == ["0.jsonl, line 1", f"0.jsonl, line {DOCUMENTS + 5}", "2.jsonl.gz"]
    assert "malformed JSON" in listed[0]["what"] and "empty text" in listed[1]["what"] and "cannot be read" in listed[2]["what"]
    assert made.counts["records_skipped"] == 3 and whole.counts["records_skipped"] == 0
    assert made.counts["documents"] == whole.counts["documents"]


def test_compressed_shards_hold_the_same_tokens_in_less_space(input: Path, tmp_path: Path) -> None:
    for compression in ("none", "zstd"):
        prepare(configure(input, compression=compression), tmp_path / compression, console=QUIET)
    raw, packed = (PreparedCorpus(tmp_path / compression).train for compression in ("none", "zstd"))
    assert all(raw[i].tolist() == packed[i].tolist() for i in range(len(raw))) and list(raw.ids) == list(packed.ids)
    sizes = [sum(file.stat().st_size for file in (tmp_path / kind / "train").glob("tokens-*")) for kind in ("none", "zstd")]
    assert sizes[1] < sizes[0]
