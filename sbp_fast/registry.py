"""A registry: named implementations of one interface, from which a configuration chooses by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Generic, TypeVar

from sbp_fast.errors import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    """A table from names to implementations, in the order of registration.

    Args:
        kind: kind of the entries, in the singular, for messages: "optimizer".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str, entry: T) -> T:
        """Add an entry and return it.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._entries[name] = entry
        return entry

    def __getitem__(self, name: str) -> T:
        """Return the entry of a name.

        Raises:
            UserError: nothing is registered under the name; the message lists the registered names.
        """
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"{self.kind} {name!r}", "is unknown", f"{hint}known: {', '.join(self._entries)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def items(self) -> list[tuple[str, T]]:
        """Return the names with their entries."""
        return list(self._entries.items())

    def unregister(self, name: str) -> None:
        """Remove an entry, as a test does with its own."""
        del self._entries[name]
