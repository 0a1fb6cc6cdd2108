"""Views of a recipe that contain only the fields of one pass, and the values for its cache key.

A pass declares fields by path: ``adapt`` is a complete section, ``adapt.steps`` is one field, and
``scale_bits`` is a property of the recipe that combines several fields. A view is a copy of the
recipe without all other fields. Reading another field raises :class:`UndeclaredFieldError`.
"""

from collections.abc import Iterable
from typing import TypeVar

from pydantic import BaseModel, JsonValue
from pydantic_core import to_jsonable_python

from sqft_export.recipe.schema import Combined, Recipe, Section

_Section = TypeVar("_Section", bound=Section)


def section_fields(
    name: str, section: type[Section], without: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Return the paths of all fields of a section, except those in ``without``."""
    return tuple(f"{name}.{field}" for field in section.model_fields if field not in without)


def view_of(recipe: Recipe, fields: Iterable[str]) -> Recipe:
    """Return a copy of the recipe in which only these fields can be read.

    >>> view_of(recipe, ["adapt.steps"]).adapt.batch
    UndeclaredFieldError: Adapt.batch is read by a pass that does not declare it
    """
    return _restrict(recipe, [path.split(".") for path in fields])


def _restrict(section: _Section, paths: list[list[str]]) -> _Section:
    view = section.model_copy()
    whole = {path[0] for path in paths if len(path) == 1}
    for name in type(section).model_fields:
        inner = [path[1:] for path in paths if path[0] == name and len(path) > 1]
        value = view.__dict__[name]
        if name in whole:
            continue
        if not inner:
            del view.__dict__[name]
        elif isinstance(value, Section):
            view.__dict__[name] = _restrict(value, inner)
    for name in whole:
        if isinstance(getattr(type(section), name, None), Combined):
            view.__dict__[name] = getattr(section, name)
    return view


def values_of(recipe: Recipe, fields: Iterable[str]) -> dict[str, JsonValue]:
    """Return path -> JSON value; None for fields of a section that the recipe lacks."""
    return {path: _value(recipe, path.split(".")) for path in fields}


def _value(found: object, path: list[str]) -> JsonValue:
    for name in path:
        found = getattr(found, name, None)
    return (
        found.model_dump(mode="json")
        if isinstance(found, BaseModel)
        else (to_jsonable_python(found))
    )
