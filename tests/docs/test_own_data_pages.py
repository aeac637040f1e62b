"""The pages about documents, vectors and models of one's own, and that of the method: their commands run as written.

Small settings stand after the commands that take any.
"""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from code_blocks import code_blocks
from embedding_server import DIMENSION, embeddings
from judge_server import serving
from small_run import SETTINGS, make_documents
from typer.testing import CliRunner

from sbp_fast.cli import app

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"
READ_ONLY = ("show", "sample", "export", "import")  # all other commands take settings


def blocks_of(page: str, language: str = "") -> list[str]:
    """Return the code blocks of a page in a language, "" for those of commands."""
    return [content for name, content in code_blocks(HOW_TO / page) if name == language]


def run_commands(block: str, *more_settings: str) -> None:
    for line in block.splitlines():
        _, *words = shlex.split(line)
        result = CliRunner().invoke(app, [*words, *(() if words[0] in READ_ONLY else (*SETTINGS, *more_settings))])
        assert result.exit_code == 0, (words, result.output, result.exception)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with `documents.jsonl` in it."""
    lines = (json.dumps({"id": id, "text": text}) + "\n" for id, text in make_documents().items())
    (tmp_path / "documents.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_stages_of_the_page_about_vectors_find_pairs_and_ask_a_server(folder: Path) -> None:
    (program,) = blocks_of("own-vectors.md", "python")
    exec(compile(program, "own-vectors.md", "exec"), {})
    _, stages, server_command = blocks_of("own-vectors.md")
    run_commands(stages)
    assert json.loads((folder / "mine/embed/manifest.json").read_text())["counts"]["dimension"] == 64
    assert json.loads((folder / "mine/pair/manifest.json").read_text())["counts"]["pairs"]
    shutil.rmtree(folder / "mine/embed")
    with serving(lambda before, body: embeddings(body)) as server:
        run_commands(server_command.replace("http://localhost:8000/v1", server.url))
    counts = json.loads((folder / "mine/embed/manifest.json").read_text())["counts"]
    assert counts["model"] == "BAAI/bge-small-en-v1.5" and counts["dimension"] == DIMENSION


@pytest.mark.slow
def test_run_of_the_page_about_vectors_ends_with_a_report(folder: Path) -> None:
    (program,) = blocks_of("own-vectors.md", "python")
    exec(compile(program, "own-vectors.md", "exec"), {})
    run, *_ = blocks_of("own-vectors.md")
    run_commands(run)
    assert "embed.file" in (folder / "runs/mine/report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_commands_of_the_page_about_models_end_with_a_model_that_transformers_loads(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(make_documents().values(), vocab_size=400, show_progress=False)
    (folder / "Qwen3-0.6B").mkdir()
    tokenizer.save(str(folder / "Qwen3-0.6B/tokenizer.json"))
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    positions = {"num_key_value_heads": 1, "vocab_size": 448, "max_position_embeddings": 2048}
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, **positions)).save_pretrained(folder / "Qwen3-0.6B")
    commands, *_ = blocks_of("own-model.md")
    small = commands.replace("--context 512", "--context 128")  # the settings of the test have microbatches of 512 tokens
    run_commands(small)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "mine-synthesizer")
    assert model.config.vocab_size == tokenizer.get_vocab_size() + 3


@pytest.mark.slow
def test_steps_of_the_page_about_documents_end_with_what_it_says(folder: Path) -> None:
    (folder / "documents.jsonl").rename("my-documents.jsonl")
    (settings,) = blocks_of("own-corpus.md", "toml")
    (folder / "mine.toml").write_text(settings, encoding="utf-8")
    dry_run, run, look, *_ = blocks_of("own-corpus.md")
    run_commands(dry_run, "seeds=[0]")
    assert not (folder / "runs").exists()
    run_commands(run + look, "seeds=[0]")
    written = (
        "report.html results.json filter/related/rejected.parquet train/sbp/samples.jsonl relation/related/relation.parquet"
    )
    assert [name for name in written.split() if not (folder / "runs/mine" / name).is_file()] == []


@pytest.mark.slow
def test_stages_of_the_page_about_the_method_follow_each_other(folder: Path) -> None:
    (stages,) = (block for block in blocks_of("../method.md") if block.startswith("sbp-fast prepare"))
    run_commands(stages, "corpus.path=documents.jsonl")
    assert json.loads((folder / "mine/compare/manifest.json").read_text())["counts"]
