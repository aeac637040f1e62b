"""The base of every configuration section, and the types that sections share."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

LARGEST = 10**15
FACTORS = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
SHORT_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kKMBT])")


def parse_count(value: Any) -> Any:
    """Return the number that a text such as "1M" or "1.5B" stands for; any other value as it is, for pydantic to judge."""
    match = SHORT_COUNT.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    number = Decimal(match[1]) * FACTORS[match[2]]
    if number != int(number):
        raise PydanticCustomError("count", "{text} is no whole number", {"text": value})
    return int(number)


Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, BeforeValidator(parse_count), Field(ge=1, le=LARGEST)]
"""A number of things, at least one; "1.5M" is 1,500,000, and k, B and T are 10^3, 10^9 and 10^12."""
CountOrZero = Annotated[int, BeforeValidator(parse_count), Field(ge=0, le=LARGEST)]
"""A number of things, or 0, which turns the setting off or leaves it to the program."""
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Processes = Annotated[int, Field(ge=0, le=10_000)]
Gibibytes = Annotated[float, Field(gt=0, le=1e6)]
Name = Annotated[str, Field(min_length=1)]

NO_EFFECT = "the output does not depend on this field"
"""Mark of a field (`Annotated[int, NO_EFFECT]`) that decides how or where work is done, not its result.

Changing a marked field makes no output stale. Where a marked field is a path, the content of the file is an input of the stage
and has a fingerprint of its own.
"""


class Section(BaseModel):
    """A frozen part of the configuration; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_values(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise PydanticCustomError("truth_value", "{value} is neither a number nor text", {"value": str(value).lower()})
        return value

    def settings(self) -> dict[str, Any]:
        """Return the fields that an output depends on, JSON-representable: all but those marked `NO_EFFECT`."""
        marked = {name for name, field in type(self).model_fields.items() if NO_EFFECT in field.metadata}
        return self.model_dump(mode="json", exclude=marked)
