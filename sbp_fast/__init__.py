"""Synthetic bootstrapped pretraining, whole and fast.

The package has the names of `sbp_fast.api`, which is imported when one of them is first used, since torch takes seconds.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbp_fast.api import *  # noqa: F403

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is None:  # a module becomes an attribute by its import
        api = import_module("sbp_fast.api")
        if name in api.__all__:
            return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *import_module("sbp_fast.api").__all__]
