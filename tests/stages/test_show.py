from pathlib import Path

import pytest
from fabricated_run import write_prepared, write_run

from sbp_fast.errors import UserError
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages.show import SHOWN, show


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("show") / "run")


def printed(run: Path, stage: str, capsys: pytest.CaptureFixture[str], examples: int = 2, seed: int = 0) -> list[str]:
    show(run / stage, corpus=run / "prepare", examples=examples, seed=seed, console=Console(force_plain=True))
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("stage", ["prepare", "pair/related", "synthesize/related", "filter/related"])
def test_counts_and_as_many_examples_as_asked_for_are_printed(
    stage: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(run, stage, capsys)
    assert lines[0].startswith(f"{run / stage}: {stage.partition('/')[0]}, ")
    assert sum(line.startswith("--- ") for line in lines) == 2
    assert printed(run, stage, capsys) == lines
    assert not any(line.startswith("---") for line in printed(run, stage, capsys, examples=0))


def test_reasons_of_rejected_documents_are_counted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = [line for line in printed(run, "filter/related", capsys) if line.startswith("rejected: ")]
    assert "(" in line


def test_texts_without_a_corpus_and_other_outputs_are_refused(run: Path) -> None:
    console = Console(quiet=True)
    with pytest.raises(UserError, match="has token ids and no texts; give --corpus"):
        show(run / "pair/related", corpus=None, examples=1, seed=0, console=console)
    with pytest.raises(UserError, match=f"is the output of embed; give another one: it shows outputs of {', '.join(SHOWN)}"):
        show(run / "embed", corpus=None, examples=1, seed=0, console=console)
    with pytest.raises(UserError):
        show(run, corpus=None, examples=1, seed=0, console=console)


def test_another_corpus_than_that_of_the_output_is_refused(run: Path, tmp_path: Path) -> None:
    write_prepared(tmp_path / "other", train=30)
    for stage in ("prepare", "pair/related"):
        with pytest.raises(UserError, match="other: is not the corpus of "):
            show(run / stage, corpus=tmp_path / "other", examples=1, seed=0, console=Console(quiet=True))
