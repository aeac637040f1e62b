"""Queries of the index that a run saved."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from overrides import overridden

from sbp_fast.cli import main
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.neighbors.vectors import Vectors
from sbp_fast.pairs.pairset import PairSet


def query(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *options: str, pairs: Path | None = None
) -> tuple[int, list[str], str]:
    """Exit code, lines printed, and what was printed to standard error."""
    inputs = [str(pairs or run / "pair/related"), "--corpus", str(run / "prepare"), "--vectors", str(run / "embed")]
    return command(capsys, monkeypatch, "neighbors", *inputs, *options)


def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, list[str], str]:
    monkeypatch.setattr(sys, "argv", ["sbp-fast", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    printed = capsys.readouterr()
    return int(caught.value.code or 0), printed.out.splitlines(), printed.err


def test_document_and_its_text_have_the_neighbors_of_its_vector(
    tiny_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, vectors = PreparedCorpus(tiny_run / "prepare"), Vectors(tiny_run / "embed")
    seed = int(PairSet(tiny_run / "pair/related").seeds[0])
    matrix = vectors[np.arange(len(vectors))]
    scores = matrix @ matrix[seed]
    expected = [corpus.unique.ids[row] for row in np.argsort(-scores) if row != seed][:3]
    id, text = str(corpus.unique.ids[seed]), corpus.text(corpus.unique, seed)
    code, lines, _ = query(tiny_run, capsys, monkeypatch, "--document", id, "--count", "3")
    assert code == 0 and [line.split()[1] for line in lines] == expected
    assert float(lines[0].split()[0]) == pytest.approx(np.sort(scores)[-2], abs=1e-3)
    code, lines, _ = query(tiny_run, capsys, monkeypatch, "--text", text, "--count", "4")
    assert code == 0 and [line.split()[1] for line in lines] == [id, *expected]


def test_unusable_queries_are_refused_with_the_reason(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_run / "pair/related", damaged)
    (index,) = damaged.rglob("*.hnsw")
    index.write_bytes(index.read_bytes()[:-1000])
    for options, pairs, words in (
        ([], None, "give one of --text and --document"),
        (["--document", "nobody"], None, "document nobody: is not among the unique documents"),
        (["--text", "ships"], damaged, "partition-00000.hnsw: missing or damaged"),
        (["--text", "ships"], tiny_run / "embed", "holds the output of embed"),
    ):
        code, _, error = query(tiny_run, capsys, monkeypatch, *options, pairs=pairs)
        assert (code, error.count("\n")) == (2, 1) and words in error, error


def test_corpus_added_to_an_index_is_queried_together_with_the_first(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = PreparedCorpus(tiny_run / "prepare")
    others = range(len(first.unique), len(first.unique) + 60)
    records = [{"id": f"more-{row}", "text": first.text(first.train, row)} for row in others]
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, records)))
    more, settings = tmp_path / "more", overridden(TINY, f"corpus.path={tmp_path / 'more.jsonl'}", "corpus.unique_share=1")
    inputs = ["--corpus", more / "corpus", "--vectors", more / "vectors"]
    for arguments in (
        ["prepare", "small", *settings, "--out", more / "corpus"],
        ["embed", "small", *settings, *inputs[:2], "--out", more / "vectors"],
        ["index", "small", "--to", tiny_run / "pair/related", *inputs, "--out", more / "index"],
    ):
        code, lines, error = command(capsys, monkeypatch, *arguments)
        assert code == 0, error
    second = PreparedCorpus(more / "corpus")
    assert f"{len(second.unique)} documents to add, 0 left out" in " ".join(lines)
    matrices = [known[np.arange(len(known))] for known in (Vectors(tiny_run / "embed"), Vectors(more / "vectors"))]
    ids, matrix = [*first.unique.ids, *second.unique.ids], np.concatenate(matrices)
    corpora = [*[tiny_run / "prepare"] * len(first.unique), *[more / "corpus"] * len(second.unique)]
    for own in (0, len(first.unique) + 5):
        scores = matrix @ matrix[own]
        expected = [[ids[row], str(corpora[row])] for row in np.argsort(-scores) if row != own][:40]
        found = query(
            tiny_run, capsys, monkeypatch, *map(str, inputs), "--document", ids[own], "--count", "40", pairs=more / "index"
        )
        assert found[0] == 0 and [line.split()[1:3] for line in found[1]] == expected
        assert len({corpus for _, corpus in expected}) == 2
    text = ["--corpus", tiny_run / "prepare", *inputs[:2], "--text", second.text(second.unique, 7), "--count", 1]
    code, (line,), _ = command(capsys, monkeypatch, "neighbors", more / "index", *text)  # no vectors: a text needs none
    assert code == 0 and line.split()[1:3] == [second.unique.ids[7], str(more / "corpus")]
    code, _, error = command(
        capsys, monkeypatch, "index", "small", "--to", more / "index", *inputs, "--out", tmp_path / "again"
    )
    assert (code, error.count("\n")) == (2, 1) and "more/corpus: is already in the index" in error
