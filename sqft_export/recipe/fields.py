"""Rows that describe every field of a recipe, for ``list fields`` and the generated reference."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sqft_export.recipe.schema import TASK_KINDS, Recipe

BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
REQUIRED = "required"


@dataclass(frozen=True)
class RecipeField:
    """One row of the reference.

    section: top-level section that contains the field, such as ``task (text)``.
    field: dotted path of the field.
    allowed: type, limits or allowed words.
    default: default value in YAML.
    about: description of the field.
    """

    section: str
    field: str
    allowed: str
    default: str
    about: str


def recipe_fields() -> list[RecipeField]:
    """Return every field of a recipe, in the order of the schema."""
    return list(_fields_of(Recipe, "", "general"))


def section_about(section: str) -> str:
    """Return the first docstring line of a top-level section; empty if it has no docstring."""
    kind = section.removeprefix("task (").removesuffix(")")
    field = Recipe.model_fields.get(section)
    model = TASK_KINDS.get(kind) or (_section_of(field.annotation) if field else None)
    return _first_line(model) if model else ""


def _fields_of(model: type[BaseModel], prefix: str, section: str) -> Iterator[RecipeField]:
    for name, field in model.model_fields.items():
        path, nested = f"{prefix}{name}", _section_of(field.annotation)
        if path == "task":
            for kind, task in TASK_KINDS.items():
                yield from _fields_of(task, "task.", f"task ({kind})")
        elif nested is None:
            about = field.description or ""
            yield RecipeField(section, path, _allowed(field), _default(field), about)
        else:
            if prefix or field.description:
                allowed = "list of sections" if _is_list(field) else "section"
                about = field.description or _first_line(nested)
                yield RecipeField(
                    section if prefix else path, path, allowed, _default(field), about
                )
            end = ".0." if _is_list(field) else "."
            yield from _fields_of(nested, f"{path}{end}", section if prefix else path)


def _is_list(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple


def _first_line(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip().partition("\n")[0]


def _section_of(annotation: object) -> type[BaseModel] | None:
    """Return the first section type in an annotation; None if it has only plain values."""
    found = [
        kind
        for kind in (annotation, *get_args(annotation))
        if isinstance(kind, type) and issubclass(kind, BaseModel)
    ]
    return found[0] if found else None


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return REQUIRED
    default = field.default
    if isinstance(default, BaseModel):
        return "its defaults"
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return f"[{', '.join(map(str, default))}]"
    return str(default) if default != "" else '""'


def _allowed(field: FieldInfo) -> str:
    bounds = [
        f"{words} {getattr(limit, attribute)}"
        for limit in field.metadata
        for attribute, words in BOUNDS.items()
        if hasattr(limit, attribute)
    ]
    return ", ".join([_type_text(field.annotation), *bounds])


def _type_text(annotation: object) -> str:
    """Return the name of a type for authors of recipes: ``number``, ``list of text``, ``4, 8``."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(inside[0])
    if origin is Literal:
        return ", ".join(map(str, inside))
    if origin in (Union, UnionType):
        kinds = [_type_text(kind) for kind in inside if kind is not NoneType]
        return " or ".join(kinds) + (" or null" if NoneType in inside else "")
    if origin is tuple:
        return f"list of {_type_text(inside[0])}"
    if origin is dict:
        return "mapping"
    assert isinstance(annotation, type)
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}[annotation]
