"""The documentation site as far as it can be checked without MkDocs; `make docs` builds it strictly."""

import importlib.util
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from typer.main import get_command

from sbp_fast.cli import app
from sbp_fast.config import ArmConfig, RunConfig, Section, SourceConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
NAVIGATION = re.findall(r"^ +- .+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
OBJECTS = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", (DOCS / page).read_text("utf-8"), re.MULTILINE)]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_navigation_shows_every_page_once() -> None:
    assert sorted(NAVIGATION) == PAGES


@pytest.mark.parametrize("name", OBJECTS)
def test_every_object_of_the_reference_exists(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert getattr(import_module(module), attribute).__doc__


def test_reference_of_commands_has_every_command_with_its_options(hooks: ModuleType) -> None:
    text = hooks._commands()
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        section = text[text.index(f"## sbp-fast {name}\n") :].partition("\n## ")[0]
        assert all(f"`{option}`" in section for parameter in command.params for option in parameter.opts if "-" in option)
    assert "\\[" not in text and "[arms.NAME]" in text


def test_reference_of_the_configuration_has_every_setting_with_its_default(hooks: ModuleType) -> None:
    text = hooks._configuration()
    sections = {name: field.default for name, field in RunConfig.model_fields.items() if isinstance(field.default, Section)}
    for name, section in {**sections, "arms.NAME": ArmConfig(), "sources.NAME": SourceConfig()}.items():
        table = text[text.index(f"## [{name}]\n") :].partition("\n## ")[0]
        assert all(f"| `{key}` |" in table for key in type(section).model_fields), name
    tuning = text[text.index("## [synthesizer]\n") :].partition("\n## ")[0]
    assert "| `tokens` | integer, at least 1, at most 1000000000000000 | `250000` |" in tuning


def test_included_pages_link_to_pages_of_the_site(hooks: ModuleType) -> None:
    text = hooks._included("CONTRIBUTING.md", "how-to/extend.md")
    assert "[glossary](../glossary.md)" in text and "[CHANGELOG.md](../reference/changelog.md)" in text
    assert "](LICENSE" not in hooks._included("kernels/README.md", "how-to/kernels.md")
