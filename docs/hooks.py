"""Hooks of the documentation site: pages made from the command line and from files outside docs/.

A page holds `<!-- include: PATH -->` for a file of the repository, whose links are adapted to the site, `<!-- commands -->` for
the reference of every command, and `<!-- configuration -->` for that of every setting.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

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
    for placeholder, make in PLACEHOLDERS.items():
        if placeholder in markdown:
            markdown = markdown.replace(placeholder, make())
    return markdown


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
    return " ".join(text.replace("\\[", "[").replace("|", "\\|").split())


def _configuration() -> str:
    """Return a table of settings for each section of the configuration."""
    from sbp_fast.config import ArmConfig, RunConfig, Section, SourceConfig

    fields = RunConfig.model_fields.items()
    sections = {name: field.default for name, field in fields if isinstance(field.default, Section)}
    tables = {"arms.NAME": ArmConfig(), "sources.NAME": SourceConfig()}
    return "\n\n".join(_section(name, section) for name, section in {"": RunConfig(), **sections, **tables}.items())


def _section(name: str, section: Any) -> str:
    from sbp_fast.config import Section

    model = type(section)
    lines = [f"## {f'[{name}]' if name else 'The run'}", "", _plain(model.__doc__ or ""), ""]
    lines += ["| setting | values | default | meaning |", "|---|---|---|---|"]
    for key, field in model.model_fields.items():
        if not isinstance(field.default, Section) and (name or key not in ("arms", "sources")):
            default, meaning = json.dumps(getattr(section, key)), _plain(field.description or "")
            lines.append(f"| `{key}` | {_values(field)} | `{default}` | {meaning} |")
    return "\n".join(lines)


def _values(field: Any) -> str:
    """Return the type and the bounds of a field, and whether results depend on it."""
    from sbp_fast.config import NO_EFFECT

    bounds = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    limits = [f"{word} {getattr(mark, key)}" for mark in field.metadata for key, word in bounds.items() if hasattr(mark, key)]
    unmarked = [] if NO_EFFECT not in field.metadata else ["no effect on results"]
    return ", ".join([_type(field.annotation), *limits, *unmarked])


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(map(_type, arguments))
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if hasattr(annotation, "__metadata__"):
        return _type(arguments[0])
    names = {str: "text", int: "integer", float: "number", bool: "`true` or `false`", dict: "table"}
    return names[origin or annotation]


PLACEHOLDERS: dict[str, Callable[[], str]] = {"<!-- commands -->": _commands, "<!-- configuration -->": _configuration}
