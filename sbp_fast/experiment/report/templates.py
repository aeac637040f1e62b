"""The environment of the pages' templates.

Documents, their ids and their sources are foreign text. Control characters could hide or reorder what a page shows of them, so
the pages show such characters by name.
"""

from __future__ import annotations

from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

LINE_CHARACTERS = "\t\n\r"  # layout of a text, which HTML shows as such
CONTROLS = [*range(0x20), *range(0x7F, 0xA0)]
BIDIRECTIONAL = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]  # Unicode Standard Annex 9, table 1
SHOWN = {
    code: f"\N{MATHEMATICAL LEFT ANGLE BRACKET}U+{code:04X}\N{MATHEMATICAL RIGHT ANGLE BRACKET}"
    for code in (*CONTROLS, *BIDIRECTIONAL)
}
for character in LINE_CHARACTERS:
    del SHOWN[ord(character)]


def show_controls(value: Any) -> Any:
    """Return a text, escaped for HTML or not, with control and bidirectional characters as "⟨U+202E⟩"; else the value."""
    return value.translate(SHOWN) if isinstance(value, str) else value


def page_environment(*packages: str) -> Environment:
    """Return the environment of the templates in packages, of which the first comes first.

    What is inserted is escaped, and an unknown name is an error.
    """
    return Environment(
        loader=ChoiceLoader([PackageLoader(package, ".") for package in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=show_controls,
        trim_blocks=True,
        lstrip_blocks=True,
    )
