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
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.dedup import shingle_index
from sbp_fast.errors import UserError
from sbp_fast.filters import tasks
from sbp_fast.filters.filtering import REJECTED
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
