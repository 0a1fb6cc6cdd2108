"""Settings of the command line, such as ``sparsify.sparsity=0.6``: to which field, and as what."""

from collections.abc import Callable
from types import NoneType, UnionType
from typing import Annotated, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel

from sqft_export.errors import UserError
from sqft_export.recipe.aliases import replace_old_words
from sqft_export.recipe.schema import TASK_KINDS, Recipe

QUOTES = "\"'"
NULLS = ("null", "Null", "NULL", "~")
SHOWN_CHARACTERS = 120
_OPEN, _CLOSE = "[{(", "]})"
# Fields of a section that go with some of its methods only.
_AMOUNTS = ("sparsity", "pattern", "at_most", "overrides", "allocation", "reconstruct")
_UNUSED_BY: dict[tuple[str, str], tuple[str, ...]] = {
    ("sparsify", "none"): _AMOUNTS,
    ("sparsify", "existing"): _AMOUNTS,
    ("quantize", "none"): ("embedding_bits", "reconstruct", "nncf"),
    ("quantize", "existing"): ("embedding_bits", "reconstruct", "nncf"),
    ("quantize", "gptq"): ("nncf",),
    ("quantize", "rtn"): ("nncf",),
}


def apply_overrides(
    data: dict[str, object], settings: tuple[str, ...], read_yaml: Callable[[str, str], object]
) -> None:
    """Apply ``a.b.c=value`` settings to the mapping of a recipe file, in order.

    A method that is set takes away the file's fields that it has no use for, unless they are set
    too. Old words of both are replaced by the new ones.

    :param read_yaml: text and a name for messages -> value.
    :raises UserError: naming the setting that is none.
    """
    paths = [_apply(data, setting, read_yaml) for setting in settings]
    replace_old_words(data)
    for section in ("sparsify", "quantize"):
        found = data.get(section)
        if f"{section}.method" not in paths or not isinstance(found, dict):
            continue
        for field in _UNUSED_BY.get((section, str(found.get("method"))), ()):
            if f"{section}.{field}" not in paths:
                found.pop(field, None)


def _apply(data: dict[str, object], setting: str, read_yaml: Callable[[str, str], object]) -> str:
    """Apply one setting; returns its path."""
    path, equals, text = setting.partition("=")
    shown = repr(setting[:SHOWN_CHARACTERS])
    if not equals:
        raise UserError(f"override {shown}: expected path=value, as sparsify.sparsity=0.6")
    *parents, last = path.split(".")
    section = data
    for name in parents:
        inner = section.setdefault(name, {})
        if not isinstance(inner, dict):
            raise UserError(f"override {shown}: {name} is a value, not a section")
        section = inner
    annotation = _annotation_at(path, data)
    section[last] = _value(text, annotation, f"override {shown}", read_yaml)
    return path


def _annotation_at(path: str, data: dict[str, object]) -> object:
    """Return the type of the field at a dotted path; None if no recipe has such a field."""
    annotation: object = Recipe
    for name in path.split("."):
        sections = [t for t in _alternatives(annotation) if _is_section(t)]
        if len(sections) > 1:  # a task, which is of one kind
            task = data.get("task")
            kind = str(task.get("kind")) if isinstance(task, dict) else ""
            sections = [TASK_KINDS[kind]] if kind in TASK_KINDS else []
        field = sections[0].model_fields.get(name) if sections else None
        if field is None:
            return None
        annotation = field.annotation
    return annotation


def _alternatives(annotation: object) -> tuple[object, ...]:
    """Return the members of a union, or the type itself, without their constraints."""
    union = get_origin(annotation) in (Union, UnionType)
    members = get_args(annotation) if union else (annotation,)
    return tuple(get_args(m)[0] if get_origin(m) is Annotated else m for m in members)


def _is_section(annotation: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _value(
    text: str, annotation: object, where: str, read_yaml: Callable[[str, str], object]
) -> object:
    """Return a setting's value: parsed as YAML, but unquoted text of a text field is kept."""
    allowed = _alternatives(annotation)
    word = text.strip()
    is_null = not word or (word in NULLS and NoneType in allowed)
    if str not in allowed or is_null:
        return read_yaml(text, where)
    if word[0] not in QUOTES:
        return text
    try:
        found = read_yaml(text, where)
    except UserError:  # such as "a" or "b"
        return text
    return found if isinstance(found, str) else text


def split_values(text: str) -> list[str]:
    """Split at the commas outside of brackets and quotes: ``[32,16],[16,8]`` is two values."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in QUOTES and not values[-1].strip(" [{(,:"):
            quote = character
        elif character in _OPEN:
            depth += 1
        elif character in _CLOSE:
            depth -= 1
        if character == "," and depth <= 0 and not quote:
            values.append("")
        else:
            values[-1] += character
    return values
