"""What the README shows is what was measured and what exists."""

import re
from pathlib import Path

from bench.readme import drawn

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_tables_are_drawn_from_the_committed_results() -> None:
    assert drawn(README) == README


def test_every_path_in_the_map_and_every_link_exists() -> None:
    tree = re.search(r"```\n(README\.md.*?)```", README, re.DOTALL)
    assert tree is not None
    folder = Path()
    for line in tree[1].splitlines()[1:]:
        indent, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]
        if not indent:
            folder = Path(name) if name.endswith("/") else Path()
        assert (ROOT / (folder / name if indent else name)).exists(), line
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_command_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = set(re.findall(r'@app\.command\(\s*(?:name="(\w+)")?', (ROOT / "sbp_fast" / "cli.py").read_text()))
    functions = set(re.findall(r"^def (\w+)\(", (ROOT / "sbp_fast" / "cli.py").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE)) <= targets
    assert set(re.findall(r"^sbp-fast (\w+)", README, re.MULTILINE)) <= functions | commands
