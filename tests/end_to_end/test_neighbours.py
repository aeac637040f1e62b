"""Asking the index that a run kept."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from sbp_fast.cli import main
from sbp_fast.corpus.prepared import PreparedCorpus
from sbp_fast.pairs.pairset import PairSet
from sbp_fast.pairs.vectors import Vectors


def ask(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *options: str, pairs: Path | None = None
) -> tuple[int, list[str], str]:
    """Exit code, lines printed, and what was printed to standard error."""
    inputs = [str(pairs or run / "pairs"), "--corpus", str(run / "corpus"), "--vectors", str(run / "vectors")]
    monkeypatch.setattr(sys, "argv", ["sbp-fast", "neighbours", *inputs, *options])
    with pytest.raises(SystemExit) as caught:
        main()
    printed = capsys.readouterr()
    return int(caught.value.code or 0), printed.out.splitlines(), printed.err


def test_a_document_and_its_text_have_the_neighbours_that_its_vector_has(
    tiny_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, vectors = PreparedCorpus(tiny_run / "corpus"), Vectors(tiny_run / "vectors")
    seed = int(PairSet(tiny_run / "pairs").seeds[0])
    matrix = vectors[np.arange(len(vectors))]
    scores = matrix @ matrix[seed]
    expected = [corpus.unique.ids[row] for row in np.argsort(-scores) if row != seed][:3]
    id, text = str(corpus.unique.ids[seed]), corpus.text(corpus.unique, seed)
    code, lines, _ = ask(tiny_run, capsys, monkeypatch, "--document", id, "--count", "3")
    assert code == 0 and [line.split()[1] for line in lines] == expected
    assert float(lines[0].split()[0]) == pytest.approx(np.sort(scores)[-2], abs=1e-3)
    code, lines, _ = ask(tiny_run, capsys, monkeypatch, "--text", text, "--count", "4")
    assert code == 0 and [line.split()[1] for line in lines] == [id, *expected]


def test_what_cannot_be_asked_is_explained(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_run / "pairs", damaged)
    (index,) = damaged.rglob("*.hnsw")
    index.write_bytes(index.read_bytes()[:-1000])
    for options, pairs, words in (
        ([], None, "give one of --text and --document"),
        (["--document", "nobody"], None, "document nobody: is not among the unique documents"),
        (["--text", "ships"], damaged, "cell-00000.hnsw: missing or damaged"),
        (["--text", "ships"], tiny_run / "vectors", "holds the output of embed"),
    ):
        code, _, error = ask(tiny_run, capsys, monkeypatch, *options, pairs=pairs)
        assert (code, error.count("\n")) == (2, 1) and words in error, error
