"""Every command of README and documentation is one that exists, with options, settings and files that exist."""

import re
import shlex
import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer
from code_blocks import code_blocks
from page_commands import PAGES, ROOT, Command, commands_of
from typer.main import get_command

from sbp_fast.cli import app
from sbp_fast.config.files import load_config
from sbp_fast.errors import UserError

SBP_FAST = get_command(app).commands  # type: ignore[attr-defined]
PLACEHOLDERS = {"CONFIG": "demo", "COMMAND": "run", "RUN": "runs/demo", "NAME": "sbp"}
COMMANDS = [command for page in PAGES for command in commands_of(page)]
INLINE = [(page, shlex.split(text)) for page in PAGES for text in re.findall(r"`(sbp-fast [^`\n]+)`", page.read_text("utf-8"))]
TOML = [(page, block) for page in PAGES for language, block in code_blocks(page) if language == "toml"]
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
VARIABLES = set(re.findall(r"\$[({](?:if \$\()?([A-Z_]+)", MAKEFILE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTERNAL = {"ray", "hf", "ssh", "head", "cd", "git"}
"""Programs of others, whose arguments are theirs to check."""
EXTERNAL_MODULES = {"venv"}
USAGE_ERROR = typer.BadParameter.__bases__[0]  # typer brings its own click and exports no name for it


def check_sbp_fast(command: Command, words: list[str], folder: Path) -> None:
    """Parse a command as the command line does, and load its configuration; a TOML file is the one that the page shows."""
    name, *arguments = [PLACEHOLDERS.get(word, word) for word in words]
    context = SBP_FAST[name].make_context(name, arguments)
    settings = []
    for word in context.params.get("settings") or []:
        if word.endswith(".toml") and not (ROOT / word).exists():
            assert command.toml, f"{word} is not shown before this command"
            (folder / word).write_text(command.toml, encoding="utf-8")
            settings.append(folder / word)
        else:
            settings.append(ROOT / word if word.endswith(".toml") else word)
    files = [word for word in settings if isinstance(word, Path) or "=" not in word]
    assert files or not settings
    if settings:
        load_config(files, [word for word in settings if word not in files])


def check_make(command: Command, words: list[str], folder: Path) -> None:
    """Look for the target, and for the variables in the Makefile; those of pip go on to it by the environment."""
    for word in words:
        variable, assigned, _ = word.partition("=")
        assert (variable in VARIABLES or variable.startswith("PIP_")) if assigned else (word in TARGETS), word


def check_python(command: Command, words: list[str], folder: Path) -> None:
    """Look for the script, or for the module and the options that it reads."""
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file()
        return
    module, *arguments = words[1:]
    if module == "sbp_fast":
        check_sbp_fast(command, arguments, folder)
    elif module == "pip":
        check_pip(command, arguments, folder)
    elif module not in EXTERNAL_MODULES:
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None
        source = Path(spec.origin).read_text("utf-8")
        assert all(f'"{word}"' in source for word in arguments if word.startswith("--"))


def check_pip(command: Command, words: list[str], folder: Path) -> None:
    """Look for the folders and the extras of this project that are installed."""
    for word in words[1:]:
        if word.startswith("."):
            assert (ROOT / word.partition("[")[0] / "pyproject.toml").is_file()
        if (extra := re.fullmatch(r"(?:sbp-fast|\.)\[(.+)\]", word)) is not None:
            assert set(extra[1].split(",")) <= PROJECT["optional-dependencies"].keys()


def check_torchrun(command: Command, words: list[str], folder: Path) -> None:
    check_python(command, words[words.index("-m") :], folder)


def check_srun(command: Command, words: list[str], folder: Path) -> None:
    check_torchrun(command, words[words.index("torchrun") + 1 :], folder)


def check_docker(command: Command, words: list[str], folder: Path) -> None:
    """Look for the arguments of a build in the Dockerfile, and check what is run in the image, whose name is `sbp-fast`."""
    if words[0] == "build":
        names = {words[index + 1].partition("=")[0] for index, word in enumerate(words) if word == "--build-arg"}
        assert names <= set(re.findall(r"^ARG ([A-Z_]+)", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE))
    else:
        program, *arguments = words[words.index("sbp-fast") + 1 :]
        CHECKS[program](command, arguments, folder)


CHECKS: dict[str, Callable[[Command, list[str], Path], None]] = {
    "sbp-fast": check_sbp_fast,
    "make": check_make,
    "python": check_python,
    "pip": check_pip,
    "srun": check_srun,
    "torchrun": check_torchrun,
    "docker": check_docker,
    **dict.fromkeys(EXTERNAL, lambda *_: None),
}


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_command_of_a_page_exists_with_its_options_settings_and_files(command: Command, tmp_path: Path) -> None:
    CHECKS[command.program](command, list(command.words[1:]), tmp_path)


@pytest.mark.parametrize(("page", "words"), INLINE, ids=lambda value: shlex.join(value) if isinstance(value, list) else "")
def test_command_in_a_sentence_exists_with_its_options(page: Path, words: list[str]) -> None:
    if words[1].startswith("--"):
        return
    name, *arguments = [PLACEHOLDERS.get(word, word) for word in words[1:]]
    known = {option for parameter in SBP_FAST[name].params for option in parameter.opts} | {"--help"}
    assert {word for word in arguments if word.startswith("--")} <= known


@pytest.mark.parametrize(("page", "block"), TOML, ids=[str(page.relative_to(ROOT)) for page, _ in TOML])
def test_toml_of_a_page_is_a_configuration(page: Path, block: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(block, encoding="utf-8")
    load_config(["demo", tmp_path / "mine.toml"])


@pytest.mark.parametrize(
    "words",
    ["sbp-fast runn demo", "sbp-fast run demo --gpu 8", "sbp-fast run demo pretrain.token=1", "make tests", "make gpu PARTS=1"],
)
def test_misspelt_command_of_a_page_is_noticed(words: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```\n{words}\n```\n")
    (command,) = commands_of(page)
    with pytest.raises((KeyError, AssertionError, USAGE_ERROR, UserError)):
        CHECKS[command.program](command, list(command.words[1:]), tmp_path)


def test_block_with_an_unknown_program_is_refused_by_name(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```\ncurl -O documents.jsonl\n```\n")
    with pytest.raises(ValueError, match=r"curl -O documents\.jsonl: unknown program"):
        commands_of(page)
