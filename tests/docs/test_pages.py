"""README and documentation show what was measured and what exists; the command line accepts their commands."""

import json
import re
import shlex
from pathlib import Path

import pytest
import zstandard
from page_commands import commands_of
from small_run import SETTINGS, make_documents
from typer.testing import CliRunner

from bench.readme import pages
from sbp_fast import __version__
from sbp_fast.cli import app
from sbp_fast.config.files import load_config
from sbp_fast.config.renamed import RENAMED

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TABLES = list(pages())
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("path", TABLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_of_a_page_equal_the_committed_results(path: Path) -> None:
    assert pages()[path] == path.read_text()


def test_every_path_in_the_map_exists() -> None:
    tree = re.search(r"```\n(README\.md.*?)```", README, re.DOTALL)
    assert tree is not None
    folder = Path()
    for line in tree[1].splitlines()[1:]:
        indent, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]
        if not indent:
            folder = Path(name) if name.endswith("/") else Path()
        assert (ROOT / (folder / name if indent else name)).exists(), line


@pytest.mark.parametrize("path", TABLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_page_exists(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "bench" / "README.md"], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_make_target_of_a_page_exists(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"(?:^|`)make ([a-z-]+)", path.read_text(), re.MULTILINE))
    assert used <= targets


def test_readme_has_the_two_commands_on_lines_of_their_own() -> None:
    assert {"make run", "make test"} <= set(README.splitlines())


def test_commands_of_the_readme_run_as_written_with_small_settings_after_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [json.dumps({"id": id, "text": text}) for id, text in make_documents().items()]
    (tmp_path / "documents.jsonl.zst").write_bytes(zstandard.compress("\n".join(records).encode()))
    monkeypatch.chdir(tmp_path)
    block = README.partition("## On your own corpus")[2].partition("## ")[0]
    commands = [command for command in commands_of(ROOT / "README.md") if shlex.join(command.words) in block]
    runs = [command.words[1:] for command in commands if "mini" not in command.words]  # another corpus by the same command
    assert [words[0] for words in runs] == ["run", "export", "plan", "doctor"]
    for words in runs:
        small = [*SETTINGS, "pretrain.optimizer=adamw"] if words[0] == "run" else []
        result = CliRunner().invoke(app, [*words, *small])
        assert result.exit_code == 0, (words, result.output, result.exception)
    assert (tmp_path / "runs/mine/report.html").is_file() and (tmp_path / "mine-sbp/config.json").is_file()


def test_the_tutorials_arm_is_an_arm(tmp_path: Path) -> None:
    (table,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "mine.toml").write_text(table, encoding="utf-8")
    assert "decayed" in load_config(["demo", tmp_path / "mine.toml"]).enabled_arms


def test_changelog_names_every_renamed_key() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert [old for old, new in RENAMED.items() if f"| `{old}` | `{new}` |" not in changes] == []


def test_version_is_the_newest_of_the_changelog_and_that_of_the_citation() -> None:
    versions = re.findall(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[0] == __version__
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f'version = "{__version__}"' in (ROOT / "kernels" / "pyproject.toml").read_text(encoding="utf-8")
