"""Pages of the documentation, read as a reader does who copies their code."""

import re
from pathlib import Path


def code_blocks(page: Path) -> list[tuple[str, str]]:
    """Return language and content of each fenced block; the language is "" where none is given."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
