"""Typed JSON documents that this package writes to files or passes between processes."""

from typing import Annotated, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, JsonValue, ValidationError
from pydantic.json_schema import SkipJsonSchema

from sqft_export.errors import UserError, one_line
from sqft_export.untrusted import parse_json

MAX_FOUND_CHARACTERS = 60  # of a wrong value in a message


class Document(BaseModel):
    """A JSON object: immutable, with exact types and no unknown keys.

    Fields that were never set are not written.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        populate_by_name=True,
        ser_json_inf_nan="constants",
    )

    def to_json(self) -> dict[str, JsonValue]:
        """Return the JSON object of all fields that were set."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    @classmethod
    def parse(cls, text: str | bytes, where: str) -> Self:
        """Read a JSON text.

        :param where: name of the text in messages.
        :raises UserError: naming the text, the first wrong field, and the value found there.
        """
        parse_json(text, where)  # refuses repeated keys
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise UserError(f"{where}: {first_fault(error)}") from error


def first_fault(error: ValidationError) -> str:
    """Return field, fault and found value of the first error."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"])) or "document"
    found = "" if first["type"] == "missing" else f", found {_shown(first['input'])}"
    fault = first["msg"].removeprefix("Value error, ")
    return f"{place}: {fault}{found}"


def _shown(value: object) -> str:
    return one_line(value, MAX_FOUND_CHARACTERS)


def _refuse_null(value: object) -> object:
    if value is None:
        raise ValueError("is null; leave the field out")
    return value


_Value = TypeVar("_Value")
# A field that may be missing, which reads as None, but that is never null.
MayBeMissing = Annotated[_Value | SkipJsonSchema[None], BeforeValidator(_refuse_null)]
