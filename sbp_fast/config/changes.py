"""Sections of the configuration with some settings changed, as arms and sources change them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from sbp_fast.config.section import Section

S = TypeVar("S", bound=Section)


def change_section(section: S, changes: Mapping[str, Any], key: str, original: str) -> S:
    """Return a section with some settings changed.

    Args:
        section: to change.
        changes: setting -> new value.
        key: of the changes, for messages: "recipe".
        original: name of the section, for messages: "pretrain".

    Raises:
        ValueError: an unknown setting, or a value of the wrong type.
    """
    try:
        return type(section).model_validate(section.model_dump() | dict(changes))
    except ValidationError as error:
        first = error.errors()[0]
        setting = ".".join([key, *map(str, first["loc"][:1])])  # behind it stand the members of a union
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(first["loc"][0]), type(section).model_fields, n=1, cutoff=0.5)
            hint = f": did you mean {near[0]}?" if near else ""
            raise ValueError(f"{setting} is no setting of [{original}]{hint}") from None
        raise ValueError(f"{setting}: {first['msg'].removeprefix('Value error, ')}") from None
