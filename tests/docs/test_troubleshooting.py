"""Every message of docs/troubleshooting.md is one that the code prints."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)


def texts(path: Path) -> list[str]:
    """Return the texts of a module, docstrings left out, with … for each value in an f-string."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    collected = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            collected.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements:
            collected.append(node.value)
    return collected


TEXTS = [text for path in sorted((ROOT / "sbp_fast").rglob("*.py")) for text in texts(path)]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_of_the_page_is_in_the_code(message: str) -> None:
    assert any(message in text for text in TEXTS), message


def test_the_page_has_a_remedy_for_every_message_and_no_message_twice() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(rows) == len(MESSAGES) == len(set(MESSAGES)) > 20
    assert all(re.fullmatch(r"\| `[^`]+` \| .+\. \|", row) for row in rows)
