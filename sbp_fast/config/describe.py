"""A configuration as TOML with the meaning of each key beside its value."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import tomli_w

from sbp_fast.config.run import RunConfig
from sbp_fast.config.section import Section

WIDTH = 100


def describe_config(config: RunConfig, *, changes: bool = False) -> str:
    """Return a configuration as TOML, from which `load_config` makes an equal one.

    Args:
        config: to describe.
        changes: leave out the keys whose value is the default.
    """
    return "\n".join(_Describer(changes).tables(config, RunConfig(), "")).strip() + "\n"


class _Describer:
    """Writes tables; the keys of a kind of section are explained in its first one."""

    def __init__(self, changes: bool) -> None:
        self.changes = changes
        self.explained: set[tuple[type, str]] = set()

    def tables(self, section: Section, default: Section, path: str) -> Iterator[str]:
        """Yield the table of a section, then those within it."""
        values, defaults = section.model_dump(mode="json"), default.model_dump(mode="json")
        lines = [
            line
            for key, value in values.items()
            if not isinstance(value, dict) and not (self.changes and value == defaults[key])
            for line in self._explained(section, key, value)
        ]
        if lines:
            yield from [f"[{path}]"] * bool(path) + lines
            yield ""
        for key in (key for key, value in values.items() if isinstance(value, dict)):
            yield from self._within(getattr(section, key), getattr(default, key), f"{path}.{key}".lstrip("."))

    def _within(self, value: Any, default: Any, path: str) -> Iterator[str]:
        """Yield the tables of what a key holds: a section, sections by name, or plain values."""
        if isinstance(value, Section):
            if not (self.changes and value == default):  # a table takes the place of the default, and begins with its own
                yield from self.tables(value, type(value)(), path)
            return
        for name, entry in value.items():
            if isinstance(entry, Section):
                yield from self.tables(entry, default.get(name, type(entry)()), f"{path}.{name}")
        if plain := {name: entry for name, entry in value.items() if not isinstance(entry, Section)}:
            yield from [f"[{path}]", tomli_w.dumps(plain).rstrip(), ""]

    def _explained(self, section: Section, key: str, value: Any) -> list[str]:
        comment: list[str] = []
        if (type(section), key) not in self.explained:
            self.explained.add((type(section), key))
            meaning = " ".join((type(section).model_fields[key].description or "").split())
            comment = [f"# {line}" for line in textwrap.wrap(meaning, WIDTH)]
        return [*comment, _line(key, value)]


def _line(key: str, value: Any) -> str:
    """Return `key = value`; tomli_w spreads a list over several lines."""
    if isinstance(value, list):
        return f"{key} = [{', '.join(_line('', entry).removeprefix(' = ') for entry in value)}]"
    return tomli_w.dumps({"x": value}).rstrip().replace("x", key, 1)
