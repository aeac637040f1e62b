"""Reference-counted pages of the cache of keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SCRATCH = 0
"""The page that is never allocated: rows without a document write there."""


class PagePool:
    """Pages 1 to `pages` - 1, each free or held by one or more holders.

    Args:
        pages: number of pages, the scratch page included.
    """

    def __init__(self, pages: int) -> None:
        self._free = list(range(pages - 1, SCRATCH, -1))
        self._holders = np.zeros(pages, np.int64)

    @property
    def free(self) -> int:
        """Number of free pages."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Allocate `count` free pages, with one holder each.

        Raises:
            OutOfPages: fewer are free; none is taken.
        """
        if count > len(self._free):
            raise OutOfPages(f"{count} pages asked for, {len(self._free)} free")
        pages = [self._free.pop() for _ in range(count)]
        self._holders[pages] = 1
        return pages

    def hold(self, pages: Sequence[int]) -> None:
        """Add a holder to each of `pages`.

        Raises:
            ValueError: a page is free.
        """
        if any(self._holders[page] == 0 for page in pages):
            raise ValueError("a free page cannot be held: it may be allocated again by now")
        for page in pages:
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Remove a holder from each of `pages`; a page without holders becomes free.

        Raises:
            ValueError: a page is free.
        """
        for page in pages:
            if self._holders[page] == 0:
                raise ValueError(f"page {page} is released more often than it was held")
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)


class OutOfPages(Exception):
    """More pages are asked for than are free."""
