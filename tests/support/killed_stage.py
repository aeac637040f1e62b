"""Stages that are killed after a number of durable writes, in this process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest


class Killed(BaseException):
    """An exception in place of a SIGKILL: nothing in the program catches it."""


def count_writes(patch: pytest.MonkeyPatch, kill_after: int | None = None) -> Callable[[], int]:
    """Count the renames and unbuffered writes of the main thread from now on; raise `Killed` after `kill_after` of them."""
    writes = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal writes
            result = function(*arguments)
            if threading.current_thread() is threading.main_thread():
                writes += 1
                if writes == kill_after:
                    raise Killed
            return result

        return call

    for name in ("replace", "write"):
        patch.setattr(os, name, counted(getattr(os, name)))
    return lambda: writes
