"""Refusal of numbers that are not finite: they compare false with every threshold, and so would pass for results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from sbp_fast.errors import UserError

REMEDY = "find the input or setting that gives it: no result can rest on it"


def require_finite(value: Any, where: object) -> None:
    """Refuse a value that holds a number that is not finite, at any depth of its lists and dictionaries.

    Args:
        value: a number, or what is written as JSON.
        where: what holds the value, for the message.

    Raises:
        UserError: naming the key of the first such number.
    """
    for key, number in _not_finite(value, ""):
        raise UserError(where, f"{key.lstrip('.') or 'its value'} is not finite: {number}", REMEDY)


def require_finite_rows(values: np.ndarray, quantity: str, name: Callable[[int], str]) -> None:
    """Refuse an array in which a row holds a number that is not finite.

    Args:
        values: float [rows, ...].
        quantity: what the array holds, for the message.
        name: returns what a row belongs to, such as the id of a document, for the message.

    Raises:
        UserError: naming the first such row.
    """
    finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
    if not finite.all():
        raise UserError(name(int(np.argmin(finite))), f"its {quantity} is not finite", REMEDY)


def _not_finite(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """Yield the keys of the numbers that are not finite, as in `a.b.3`, with the numbers."""
    if isinstance(value, float):
        if not math.isfinite(value):
            yield key, value
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _not_finite(entry, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for number, entry in enumerate(value):
            yield from _not_finite(entry, f"{key}.{number}")
