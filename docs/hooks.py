"""Hooks of the documentation site: pages made from the command line and from files outside docs/.

A page holds `<!-- include: PATH -->` for a file of the repository, whose links are adapted to the site, and
`<!-- commands -->` for the reference of every command.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = {
    "CONTRIBUTING.md": "how-to/extend.md",
    "kernels/README.md": "how-to/kernels.md",
    "CHANGELOG.md": "reference/changelog.md",
}
"""Files outside docs/ -> the pages that include them."""
INCLUDE = re.compile(r"<!-- include: (\S+) -->")
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the placeholders of a page."""
    location = page.file.src_uri
    markdown = INCLUDE.sub(lambda match: _included(match[1], location), markdown)
    return markdown.replace("<!-- commands -->", _commands()) if "<!-- commands -->" in markdown else markdown


def _included(path: str, location: str) -> str:
    """Return a file of the repository for the page at `location`; its links to files without a page become plain text."""

    def adapt(match: re.Match[str]) -> str:
        text, link, anchor = match.groups(default="")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
        page = PAGES.get(target) or target.removeprefix("docs/")
        if page == target:
            return text
        return f"[{text}]({posixpath.relpath(page, posixpath.dirname(location) or '.')}{anchor})"

    return LINK.sub(adapt, (ROOT / path).read_text(encoding="utf-8"))


def _commands() -> str:
    """Return the help of every command as Markdown."""
    from typer.main import get_command

    from sbp_fast.cli import app

    group: Any = get_command(app)
    return "\n\n".join(_command(name, command) for name, command in sorted(group.commands.items()))


def _command(name: str, command: Any) -> str:
    lines = [f"## sbp-fast {name}", "", (command.help or "").strip(), ""]
    rows = [(_shown(parameter), _plain(getattr(parameter, "help", "") or "")) for parameter in command.params]
    lines += ["| argument or option | meaning |", "|---|---|", *(f"| {shown} | {meaning} |" for shown, meaning in rows), ""]
    if command.epilog:
        lines += ["```", command.epilog.removeprefix("Example: "), "```"]
    return "\n".join(lines)


def _shown(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        shown = f"`{parameter.metavar or parameter.name.upper()}`"
    else:
        shown = ", ".join(f"`{option}`" for option in parameter.opts)
    return f"{shown} (required)" if parameter.required else shown


def _plain(text: str) -> str:
    """Return help without the escapes of rich's markup, as the cell of a table."""
    return text.replace("\\[", "[").replace("|", "\\|")
