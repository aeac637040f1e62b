import sys
from pathlib import Path

import pytest
from tiny_synthesis import make_inputs
from tiny_training import QUIET, configure

from sbp_fast.cli import main
from sbp_fast.errors import UserError
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages.sample import sample

SEED = "the cat sees the red house near the river"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_inputs(tmp_path_factory.mktemp("sample"))


def test_documents_depend_on_the_seed_text_and_the_random_seed_alone(inputs: dict[str, Path]) -> None:
    def write(text: str, seed: int, count: int = 3) -> list[str]:
        config = configure(inputs["directory"], f"seed={seed}", "device=cpu")
        return sample(config, inputs["model"], corpus=inputs["corpus"], seed_text=text, count=count, console=QUIET)

    first = write(SEED, 0)
    assert len(first) == len(set(first)) == 3
    assert write(SEED, 0) == first and write(SEED, 0, 1) == first[:1]
    assert write(SEED, 1) != first and write("", 0) != first and write("a dog eats", 0) != first


def test_text_longer_than_the_context_is_truncated_and_said_to_be(
    inputs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(inputs["directory"], "device=cpu")
    long = SEED * 30
    texts = sample(config, inputs["model"], corpus=inputs["corpus"], seed_text=long, count=1, console=Console(force_plain=True))
    assert texts and "of which the model read the first 30" in capsys.readouterr().out


def test_command_prints_each_document(
    inputs: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [inputs["model"], "--corpus", inputs["corpus"], "--seed-text", SEED, "--count", 2, "--temperature", 0]
    monkeypatch.setattr(sys, "argv", ["sbp-fast", "sample", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr().out
    first, second = printed.split("--- document ")[1:]
    assert not ended.value.code and first.splitlines()[1:] == second.splitlines()[1:]  # the most probable tokens twice


def test_model_without_a_corpus_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    config = configure(inputs["directory"], "device=cpu")
    with pytest.raises(UserError):
        sample(config, inputs["model"], corpus=tmp_path, seed_text=SEED, count=1, console=QUIET)
