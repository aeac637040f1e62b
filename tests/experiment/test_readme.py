"""What the README shows is what was measured and what exists."""

import re
from pathlib import Path

import pytest

from bench.readme import pages

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
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


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_page_exists(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_of_a_page_exists(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = set(re.findall(r'@app\.command\(\s*(?:name="(\w+)")?', (ROOT / "sbp_fast" / "cli.py").read_text()))
    functions = set(re.findall(r"^def (\w+)\(", (ROOT / "sbp_fast" / "cli.py").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)", path.read_text(), re.MULTILINE)) <= targets
    assert set(re.findall(r"^sbp-fast (\w+)", path.read_text(), re.MULTILINE)) <= functions | commands
