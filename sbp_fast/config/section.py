"""The base of every configuration section, and the types that sections share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

NO_EFFECT = "the output does not depend on this field"
"""Mark of a field (`Annotated[int, NO_EFFECT]`) that decides how or where work is done, not its result.

Changing a marked field makes no output stale. Where a marked field is a path, the content of the file is an input of the stage
and has a fingerprint of its own.
"""


class Section(BaseModel):
    """A frozen part of the configuration; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def settings(self) -> dict[str, Any]:
        """Return the fields that an output depends on, JSON-representable: all but those marked `NO_EFFECT`."""
        marked = {name for name, field in type(self).model_fields.items() if NO_EFFECT in field.metadata}
        return self.model_dump(mode="json", exclude=marked)
