"""URLs without their secrets, for everything that is written or printed."""

from __future__ import annotations

import re
from typing import Any

USER = re.compile(r"(?<=://)[^/?#\s@]*@(?:[^/?#\s@]*@)*")
PARAMETER = re.compile(
    r"([?&][\w.%-]*(?:token|key|signature|sig|secret|password|passwd|credential)[\w.%-]*=)[^&#\s'\"]+", re.IGNORECASE
)
HIDDEN = "***"


def without_credentials(text: str) -> str:
    """Return a text with the user and password of every URL removed, and the value of a parameter such as a token hidden."""
    return PARAMETER.sub(lambda match: match[1] + HIDDEN, USER.sub("", text)) if "://" in text else text


def strip_credentials(value: Any) -> Any:
    """Return a JSON-representable value, all of whose strings have been through `without_credentials`."""
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, dict):
        return {key: strip_credentials(entry) for key, entry in value.items()}
    return [strip_credentials(entry) for entry in value] if isinstance(value, list | tuple) else value
