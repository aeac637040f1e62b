import itertools
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import QUIET, configure, make_corpus
from written_corpus import Row, fresh_tokens, make_written

from sbp_fast.config import FilterConfig
from sbp_fast.data import holdout as selection
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.dedup import shingle_index
from sbp_fast.dedup.lsh import candidate_pairs
from sbp_fast.errors import UserError
from sbp_fast.filters import tasks
from sbp_fast.filters.filtering import REJECTED
from sbp_fast.filters.near_duplicates import find_duplicates
from sbp_fast.filters.rules import FILTER_RULES, document_rules
from sbp_fast.filters.tasks import FilterTask, count_shingles
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.stage import SCRATCH
from sbp_fast.stages.filter import filter_documents

WIDTH = 6
RANDOM = np.random.default_rng(7)
fresh = partial(fresh_tokens, RANDOM)
OVERRIDES = (
    "filter={minimum_tokens=10, shingle_tokens=6, copy_containment=0.2, minimum_compression_ratio=0.7}",
    "filter.evaluation_containment=0.15",
)
NAMES = list(FILTER_RULES)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("filter")
    question = {"prompt": "Where does THE small red", "choices": ["cat", "house of 7 doors sleep"], "answer": 1}
    (directory / "questions.jsonl").write_text(json.dumps(question) + "\n")
    return {"directory": directory, "corpus": make_corpus(directory)}


def run(inputs: dict[str, Path], synthetic: Path, out: Path, *overrides: str) -> Manifest:
    questions = f"evaluate.choices='{inputs['directory']}/questions.jsonl'"
    config = configure(inputs["directory"], *OVERRIDES, questions, *overrides)
    return filter_documents(config, out, corpus=inputs["corpus"], synthetic=synthetic, console=QUIET)


def runs(tokens: Any) -> list[tuple[int, ...]]:
    return [tuple(int(token) for token in tokens[i : i + WIDTH]) for i in range(len(tokens) - WIDTH + 1)]


def repeated_with_changes() -> list[int]:
    """Return the same five tokens over and over with another token between each time, so that no shingle occurs twice."""
    word = fresh(5)
    return [token for between in range(35, 95) for token in (*word, between)]


def constructed(inputs: dict[str, Path]) -> list[tuple[str, Row]]:
    """Return documents with the reject reason of each; copies lie on both sides of their thresholds."""
    prepared = PreparedCorpus(inputs["corpus"])
    unique, tokenizer = prepared.unique, prepared.tokenizer
    longest = sorted(range(len(unique)), key=lambda i: -len(unique[i]))
    seed, other = longest[0], longest[1]
    head, foreign = (unique[i][1:-1][:9].tolist() for i in (seed, other))
    real = {run for i in range(len(unique)) for run in runs(unique[i][1:-1])}
    texts = (prepared.heldout[i][1:-1] for i in range(len(prepared.heldout)))
    held = next(text[i : i + 9] for text in texts for i in range(len(text) - 8) if not real & set(runs(text[i : i + 9])))
    kept, run_twice = fresh(30), fresh(12)
    asked = tokenizer.encode("Where does the\nSMALL red house of 7 doors sleep")
    return [
        ("", (seed, kept, "end")),
        ("too_short", (seed, fresh(9), "length")),
        ("", (seed, fresh(10), "end")),
        ("unfinished", (seed, [*run_twice, *run_twice], "length")),
        ("repetition", (seed, [*run_twice, *run_twice], "end")),
        ("repetition", (seed, fresh(20), "repetition")),
        ("compressible", (seed, repeated_with_changes(), "end")),
        ("malformed", (seed, [*fresh(30), 110], "end")),
        ("", (seed, [*fresh(60), 110], "end")),
        ("copies_seed", (seed, [*head, *fresh(16)], "end")),
        ("copies_corpus", (seed, [*foreign, *fresh(16)], "end")),
        ("", (seed, [*head[:8], *fresh(17)], "end")),
        ("contaminated", (seed, [*held.tolist(), *fresh(17)], "end")),
        ("", (seed, [*held[:8].tolist(), *fresh(18)], "end")),
        ("contaminated", (seed, [*fresh(60), *asked, *fresh(9)], "end")),
        ("", (other, [*kept[:13], 5, *kept[14:]], "end")),
        ("duplicate", (other, [*kept[:-1], 5], "end")),
        ("duplicate", (other, kept, "end")),
    ]


@pytest.fixture(scope="module")
def filtered(inputs: dict[str, Path]) -> dict[str, Any]:
    cases = constructed(inputs)
    synthetic = make_written(inputs["corpus"], inputs["directory"] / "synthetic", [row for _, row in cases])
    out = inputs["directory"] / "kept"
    manifest = run(inputs, synthetic, out)
    return {"expected": [reason for reason, _ in cases], "synthetic": synthetic, "out": out, "manifest": manifest}


def test_rejected_documents_have_the_first_reason_that_applies(filtered: dict[str, Any]) -> None:
    written, kept = Corpus(filtered["synthetic"]), Corpus(filtered["out"])
    assert len(written.shard_starts) > 4
    expected: list[str] = filtered["expected"]
    assert set(expected) == {"", *NAMES}
    rejected = pq.read_table(filtered["out"] / REJECTED).to_pylist()
    assert [row["reason"] for row in rejected] == [reason for reason in expected if reason]
    for row, i in zip(rejected, (i for i, reason in enumerate(expected) if reason), strict=True):
        columns = written.documents.slice(i, 1).to_pylist()[0]
        row.pop("value")
        assert row == {name: columns[name] for name in ("id", "seed", "sample", "tokens")} | {"reason": expected[i]}
    passing = [i for i, reason in enumerate(expected) if not reason]
    assert kept.documents.to_pylist() == written.documents.take(passing).to_pylist()
    assert [document.tolist() for document in map(kept.__getitem__, range(len(kept)))] == [written[i].tolist() for i in passing]


def test_counts_have_every_rule_with_its_threshold(filtered: dict[str, Any]) -> None:
    counts, expected = filtered["manifest"].counts, filtered["expected"]
    written = Corpus(filtered["out"])
    assert (counts["filtered_documents"], counts["filtered_tokens"]) == (len(written), written.tokens)
    assert counts["documents"] == len(expected)
    assert list(counts["rules"]) == NAMES
    for name, rule in counts["rules"].items():
        assert (rule["rejected"], rule["share"]) == (expected.count(name), expected.count(name) / len(expected))
    thresholds = {name: rule["threshold"] for name, rule in counts["rules"].items()}
    assert thresholds["copies_corpus"] == thresholds["copies_seed"] == 0.2 and thresholds["contaminated"] == 0.15
    assert (thresholds["too_short"], thresholds["unfinished"], thresholds["duplicate"]) == (10, False, 0.8)


def test_contaminated_documents_are_counted_by_task(inputs: dict[str, Path], tmp_path: Path) -> None:
    """Documents with both questions, with the open one, and with held-out text; a question's task is its file's name."""
    prepared = PreparedCorpus(inputs["corpus"])
    real = {run for i in range(len(prepared.unique)) for run in runs(prepared.unique[i][1:-1])}
    texts = [prepared.heldout[i][1:-1] for i in range(len(prepared.heldout))]
    held = next(text[i : i + 9] for text in texts for i in range(len(text) - 8) if not real & set(runs(text[i : i + 9])))
    open_question = {"prompt": "How many geese fly", "answers": ["over 9 ships of lead", "under 9 ships of lead"]}
    (tmp_path / "geese.jsonl").write_text(json.dumps(open_question) + "\n")
    asked = prepared.tokenizer.encode("where does the small red house of 7 doors sleep")
    geese = prepared.tokenizer.encode("How many geese fly over 9 ships of lead")
    bodies = [[*asked, *geese], geese, [*held.tolist(), *fresh(17)], fresh(60)]
    rows = [(1, [*fresh(30), *body, *fresh(9)] if len(body) != 26 else body, "end") for body in bodies]
    synthetic = make_written(inputs["corpus"], tmp_path / "synthetic", rows)
    manifest = run(inputs, synthetic, tmp_path / "out", f"evaluate.open_questions='{tmp_path}/geese.jsonl'")
    assert manifest.counts["rules"]["contaminated"]["rejected"] == 3
    assert manifest.counts["contamination"] == {
        "questions": {"texts": 1, "rejected": 1},
        "geese": {"texts": 2, "rejected": 2},
        "held-out documents alone": {"texts": len(prepared.heldout), "rejected": 1},
    }


def test_values_of_rejected_documents_equal_brute_force(inputs: dict[str, Path], filtered: dict[str, Any]) -> None:
    prepared, written = PreparedCorpus(inputs["corpus"]), Corpus(filtered["synthetic"])
    unique, heldout = ([runs(corpus[i][1:-1]) for i in range(len(corpus))] for corpus in (prepared.unique, prepared.heldout))
    real = set(itertools.chain.from_iterable(unique))
    evaluation = set(itertools.chain.from_iterable(heldout)) - real
    bodies = {id: written[i][1:-1] for i, id in enumerate(written.ids)}

    def share(shingles: set[Any], known: set[Any]) -> float:
        return len(shingles & known) / len(shingles)

    for row in pq.read_table(filtered["out"] / REJECTED).to_pylist():
        body = bodies[row["id"]]
        shingles, text = set(runs(body)), prepared.tokenizer.decode(body)
        occurrences = [runs(body).count(run) for run in runs(body)]
        asked = "of 7 doors" in text
        expected = {
            "too_short": len(body),
            "unfinished": len(body),
            "repetition": sum(count > 1 for count in occurrences) / max(len(occurrences), 1),
            "compressible": len(zstandard.compress(text.encode())) / len(text.encode()),
            "malformed": text.count("\N{REPLACEMENT CHARACTER}") / len(text),
            "copies_seed": share(shingles, set(unique[row["seed"]])) if shingles else 0,
            "copies_corpus": share(shingles, real) if shingles else 0,
            "contaminated": 1 if asked else share(shingles, evaluation) if shingles else 0,
            "duplicate": max(
                len(shingles & set(runs(other))) / len(shingles | set(runs(other)))
                for id, other in bodies.items()
                if id != row["id"]
            ),
        }
        tolerance = 0.05 if row["reason"] == "compressible" else 0  # a frame may hold its content's size
        assert row["value"] == pytest.approx(expected[row["reason"]], abs=tolerance), row


def test_document_with_an_open_question_and_one_of_its_answers_is_contaminated(inputs: dict[str, Path], tmp_path: Path) -> None:
    question = {
        "prompt": "Question: x\nAnswer:",
        "question": "Where does THE small red",
        "answers": ["cat", "house of 7 doors"],
    }
    (tmp_path / "open.jsonl").write_text(json.dumps(question) + "\n")
    tokenizer = PreparedCorpus(inputs["corpus"]).tokenizer
    rows = [
        (1, [*fresh(60), *tokenizer.encode(f"where does the small red {answer}"), *fresh(9)], "end")
        for answer in ("house of 7 doors", "ship of 9 lands")
    ]
    synthetic = make_written(inputs["corpus"], tmp_path / "synthetic", rows)
    open_questions = f"evaluate.open_questions='{tmp_path}/open.jsonl'"
    none = "evaluate.continuation_questions=0"
    config = configure(inputs["directory"], *OVERRIDES, open_questions, none, "filter.evaluation_containment=0.9")
    manifest = filter_documents(config, tmp_path / "out", corpus=inputs["corpus"], synthetic=synthetic, console=QUIET)
    assert manifest.counts["rules"]["contaminated"]["rejected"] == 1 and manifest.counts["filtered_documents"] == 1
    assert "questions of open" in manifest.inputs


def test_evaluation_text_that_the_unique_documents_have_is_no_contamination(inputs: dict[str, Path], tmp_path: Path) -> None:
    prepared = PreparedCorpus(inputs["corpus"])
    body = prepared.unique[0][1:-1].tolist()
    question = {"prompt": prepared.tokenizer.decode(body[:10]), "choices": ["x", prepared.tokenizer.decode(body[10:20])]}
    (tmp_path / "questions.jsonl").write_text(json.dumps({**question, "answer": 1}) + "\n")
    synthetic = make_written(inputs["corpus"], tmp_path / "synthetic", [(1, [*fresh(90), *body[:20]], "end")])
    choices = f"evaluate.choices='{tmp_path}/questions.jsonl'"
    manifest = run(inputs, synthetic, tmp_path / "out", choices, "filter.evaluation_containment=0.01")
    assert manifest.counts["filtered_documents"] == 1


@given(st.lists(st.integers(0, 2), min_size=1, max_size=25), st.integers(0, 2**32))
def test_near_duplicates_equal_brute_force(families: list[int], seed: int) -> None:
    """Documents of one family are far more similar than the limit, documents of two families far less."""
    random = np.random.default_rng(seed)
    originals = random.integers(0, 1000, (3, 120))
    bodies = []
    for family in families:
        body = originals[family].copy()
        changed = random.integers(3)
        body[[5, 110][:changed]] = random.integers(1000, 9000, changed)  # at most 12 of 115 shingles are others
        bodies.append(np.concatenate([[0], body, [1]]))
    sets = [set(runs(body[1:-1])) for body in bodies]
    stay: list[int] = []
    expected = []
    for i, shingles in enumerate(sets):
        alike = [len(shingles & sets[j]) / len(shingles | sets[j]) for j in stay]
        if max(alike, default=0) >= 0.75:
            expected.append((i, next(one for one in alike if one >= 0.75)))
        else:
            stay.append(i)
    documents, values = duplicates_of(bodies, 0.75)
    assert list(zip(documents, values, strict=True)) == expected


def duplicates_of(bodies: list[np.ndarray], similarity: float) -> tuple[list[int], list[float]]:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as directory:
        files = []
        for part in range(2):
            numbers = [number for number in range(len(bodies)) if number % 2 == part]
            texts = [bodies[number][1:-1] for number in numbers]
            joined = np.concatenate([np.zeros(0, np.uint32), *texts]).astype(np.uint32)
            keys = tasks.token_band_keys(joined, np.cumsum([0, *map(len, texts)]), WIDTH, tasks.BANDS, tasks.ROWS)
            files.append(Path(directory) / str(part))
            with open(files[-1], "wb") as file:
                np.save(file, np.concatenate([np.array([numbers], np.uint64), keys]))
        documents, values = find_duplicates(bodies, files, WIDTH, similarity)  # type: ignore[arg-type]
    return documents.tolist(), values.tolist()


def test_equal_documents_are_found_with_another_between_them() -> None:
    base = np.arange(200)
    bodies = [np.concatenate([[0], base, [1]])] * 3
    bodies.insert(1, np.concatenate([[0], base[:40], [1]]))
    assert duplicates_of(bodies, 0.8) == ([2, 3], [1, 1])


def test_above_a_similarity_of_one_equal_documents_stay() -> None:
    bodies = [np.concatenate([[0], np.arange(200), [1]])] * 3
    assert duplicates_of(bodies, 1.0) == ([1, 2], [1, 1]) and duplicates_of(bodies, 1.01) == ([], [])


def test_candidate_that_is_a_duplicate_is_replaced_by_what_it_duplicates() -> None:
    first, second, third = np.arange(122), np.arange(122), np.arange(122)
    second[50], third[[50, 90]] = 900, (900, 901)
    assert duplicates_of([first, second, third], 0.85) == ([1], [109 / 121])  # the third shares 103 of 127 with the first
    assert duplicates_of([first, second, third], 0.8) == ([1, 2], [109 / 121, 103 / 127])


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12), st.integers(1, 12), st.integers(1, 4)
)
def test_candidate_pairs_are_with_the_first_and_the_previous_document_of_a_bucket(
    keys: list[tuple[int, int]], cut: int, at_once: int
) -> None:
    from tempfile import TemporaryDirectory

    expected = set()
    for band in range(2):
        for key in {row[band] for row in keys}:
            group = [number for number, row in enumerate(keys) if row[band] == key]
            expected |= {(group[0], number) for number in group[1:]} | set(itertools.pairwise(group))
    stored = np.array([[number, *row] for number, row in enumerate(keys)], np.uint64).T
    stored[1:] <<= np.uint64(62)
    with TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "HASHES_IN_MEMORY", at_once)
        files = [Path(directory) / name for name in "ab"]
        for path, part in zip(files, (stored[:, :cut], stored[:, cut:]), strict=True):
            with open(path, "wb") as file:
                np.save(file, part)
        assert [tuple(pair) for pair in candidate_pairs(files).tolist()] == sorted(expected)


@given(st.integers(2, 9))
def test_shingle_counts_do_not_depend_on_the_number_of_passes(
    inputs: dict[str, Path], filtered: dict[str, Any], passes: int
) -> None:
    from tempfile import TemporaryDirectory

    prepared, synthetic = PreparedCorpus(inputs["corpus"]), filtered["synthetic"]
    counts, config = [], FilterConfig(shingle_tokens=WIDTH)
    for wanted in (1, passes):
        with TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
            ranges = [(number << 64) // wanted for number in range(wanted + 1)]
            plan = [(low, high - 1) for low, high in itertools.pairwise(ranges)]
            patch.setattr(tasks, "plan_passes", lambda positions, memory, plan=plan: (1 << 14, plan))
            shards = [
                FilterTask(inputs["corpus"], synthetic, "", Path(directory), number, config, document_rules())
                for number in range(len(Corpus(synthetic).shard_starts) - 1)
            ]
            count_shingles(shards, prepared, ["a question of no great length"], 2, lambda documents: None)
            counts.append([np.load(shard.file("shingles"))["counts"].tolist() for shard in shards])
    assert counts[0] == counts[1]
    assert sum(sum(row) for shard in counts[0] for row in shard) > 0


def test_filtered_corpus_does_not_depend_on_the_memory(
    inputs: dict[str, Path], filtered: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shingle_index, "MINIMUM_SLOTS", 64)
    tables: list[int] = []
    zeros = np.zeros

    def observed(size: Any, dtype: Any = float) -> np.ndarray:
        tables.append(size * np.dtype(dtype).itemsize)
        return zeros(size, dtype)

    monkeypatch.setattr(shingle_index.np, "zeros", observed)
    index = shingle_index.ShingleIndex
    monkeypatch.setattr(tasks, "ShingleIndex", lambda *arguments: index(*arguments))
    manifest = run(inputs, filtered["synthetic"], tmp_path / "out", f"filter.memory_gib={8 * 1024 / 2**30}")
    assert manifest.counts == filtered["manifest"].counts
    assert manifest.fingerprint == filtered["manifest"].fingerprint
    assert tables.count(8 * 1024) > 3


def test_killed_and_rerun_gives_the_same_corpus(
    inputs: dict[str, Path], filtered: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = len(Corpus(filtered["synthetic"]).shard_starts) - 1
    few = f"filter.memory_gib={8 * 1024 / 2**30}"
    monkeypatch.setattr(shingle_index, "MINIMUM_SLOTS", 64)
    script = f"""
import os, signal
from pathlib import Path
import test_filter, sbp_fast.dedup.shingle_index as shingle_index, sbp_fast.filters.tasks as tasks
shingle_index.MINIMUM_SLOTS = 64
inputs = {{name: Path(path) for name, path in { ({name: str(path) for name, path in inputs.items()})!r}.items()}}
counted, left = tasks._count_shard, [int(os.environ["SHARDS"])]
def count(*arguments):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return counted(*arguments)
tasks._count_shard = count
test_filter.run(inputs, Path({str(filtered["synthetic"])!r}), Path({str(tmp_path / "out")!r}), "threads=1", {few!r})
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    process = subprocess.run([sys.executable, "-c", script], env={**environment, "SHARDS": str(shards + 2)}, check=False)
    assert process.returncode == -signal.SIGKILL
    features = tmp_path / "out.partial" / SCRATCH
    passes = [int(np.load(path)["passes"]) for path in sorted(features.glob("shingles-*[0-9]"))]
    assert passes == [2, 2] + [1] * (shards - 2)
    again = run(inputs, filtered["synthetic"], tmp_path / "out", few)
    assert again.fingerprint == filtered["manifest"].fingerprint
    assert not (tmp_path / "out" / SCRATCH).exists()


def test_keep_unfinished_keeps_unfinished_documents(inputs: dict[str, Path], tmp_path: Path) -> None:
    synthetic = make_written(inputs["corpus"], tmp_path / "synthetic", [(0, fresh(20), "length"), (0, fresh(3), "length")])
    manifest = run(inputs, synthetic, tmp_path / "out", "filter.keep_unfinished=true")
    assert {name: rule["rejected"] for name, rule in manifest.counts["rules"].items() if rule["rejected"]} == {"too_short": 1}
    assert Corpus(tmp_path / "out").column("stop").tolist() == ["length"]


def test_near_duplicate_of_a_rejected_document_is_kept(inputs: dict[str, Path], tmp_path: Path) -> None:
    body = fresh(40)
    synthetic = make_written(inputs["corpus"], tmp_path / "synthetic", [(0, body, "length"), (0, body[:-1], "end")])
    manifest = run(inputs, synthetic, tmp_path / "out")
    assert manifest.counts["rules"]["unfinished"]["rejected"] == 1 == manifest.counts["filtered_documents"]


def test_filter_that_rejects_everything_names_the_reasons_and_leaves_nothing(inputs: dict[str, Path], tmp_path: Path) -> None:
    rows = [(0, fresh(3), "end"), (1, fresh(20), "length"), (2, fresh(4), "end")]
    synthetic = make_written(inputs["corpus"], tmp_path / "synthetic", rows)
    with pytest.raises(UserError, match=r"no document passes the filters: 2 too_short, 1 unfinished.*tune the synthesizer"):
        run(inputs, synthetic, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_documents_of_another_corpus_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    other = make_corpus(tmp_path, "seed=1")
    synthetic = make_written(other, tmp_path / "synthetic", [(0, fresh(20), "end")])
    with pytest.raises(UserError, match="was not made from"):
        run(inputs, synthetic, tmp_path / "out")
