"""YAML 1.2 and overrides to a recipe; what is wrong, as a user reads it."""

import difflib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pydantic
from pydantic import BaseModel
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode

from sqft_export.errors import UserError, one_line
from sqft_export.recipe.builtin import builtin_recipes, find_recipe
from sqft_export.recipe.overrides import apply_overrides
from sqft_export.recipe.schema import TASK_KINDS, Recipe
from sqft_export.textfiles import decode_text
from sqft_export.untrusted import fault_of_file, read_bounded, real_path

MERGE = "tag:yaml.org,2002:merge"
# A recipe has a page. What is larger is something else, or made to keep a reader busy.
LARGEST_BYTES = 2**16
MOST_VALUES = 10_000  # aliases counted as often as they stand for something
DEEPEST = 16
LONGEST_TEXT = 4096
LARGEST_NUMBER = 2**53
MOST_LINES = 20  # of a message
SHOWN = 120  # characters of what was found


class _Constructor(SafeConstructor):
    """Refuse merge keys: a few lines of nested copies expand to billions of values."""

    def flatten_mapping(self, node: MappingNode) -> None:
        for key, _ in node.value:
            if key.tag == MERGE:
                problem = "merge keys (<<) are not read; write the settings out"
                raise ConstructorError(problem=problem, problem_mark=key.start_mark)


def read_yaml(text: str, where: str) -> object:
    yaml = YAML(typ="safe", pure=True)  # YAML 1.2: 1e-4 is a number, 2:4 is not
    yaml.Constructor = _Constructor
    try:
        return yaml.load(text)
    except MarkedYAMLError as error:
        problem = f"{error.problem or error.context or 'damaged'} {error.problem_mark or ''}"
        raise UserError(f"{where}: not valid YAML: {one_line(problem)}") from error
    except RecursionError as error:
        raise UserError(f"{where}: not valid YAML: nested too deeply") from error
    except Exception as error:  # a parser of many kinds: bad dates, tags, escapes, characters
        shown = one_line(error, SHOWN)
        raise UserError(f"{where}: not valid YAML: {type(error).__name__}: {shown}") from error


def _values(node: object, path: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    """Yield path and value of every key, scalar and section; an alias counts once per use."""
    yield path, node
    if depth > DEEPEST:
        return
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{path}.{key}" if path else str(key), key
            yield from _values(value, f"{path}.{key}" if path else str(key), depth + 1)
    elif isinstance(node, list | tuple | set):
        for number, value in enumerate(node):
            yield from _values(value, f"{path}.{number}", depth + 1)


def _fault_of(path: str, value: object) -> str | None:
    """Return why a value is allowed in no field of a recipe; None if it may be."""
    if path.count(".") > DEEPEST:
        return "is nested too deeply"
    if isinstance(value, str):
        if len(value) > LONGEST_TEXT:
            return f"has {len(value)} characters; at most {LONGEST_TEXT} are read"
        if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            return "holds a character that no text or file name has"
    beyond = f"found a number beyond {LARGEST_NUMBER}"
    if isinstance(value, float):
        return None if math.isfinite(value) else beyond
    return beyond if isinstance(value, int) and abs(value) > LARGEST_NUMBER else None


def _check_values(data: object, where: str) -> None:
    """Check every value of a recipe before it is validated.

    :raises UserError: at the first value that no field may hold.
    """
    for count, (path, value) in enumerate(_values(data)):
        if count > MOST_VALUES:
            raise UserError(f"{where}: holds more than {MOST_VALUES} values, aliases counted")
        if fault := _fault_of(path, value):
            raise UserError(f"{where}: {path[:SHOWN]}: {fault}")


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Return the names of the fields of the section that contains ``location``."""
    model: type[BaseModel] | None = Recipe
    for name in location[:-1]:
        if name in TASK_KINDS and model is None:
            model = TASK_KINDS[str(name)]
            continue
        field = model.model_fields.get(str(name)) if model else None
        annotation = field.annotation if field else None
        kinds = get_args(annotation) or (annotation,)  # a section that may be left out is a union
        sections = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        model = sections[0] if len(sections) == 1 else None
    return list(model.model_fields) if model else []


def _path_of(location: tuple[int | str, ...]) -> str:
    """Return a location in the words of a recipe; pydantic adds a task's kind after ``task``."""
    names = list(location)
    if names[:1] == ["task"] and len(names) > 1 and names[1] in TASK_KINDS:
        del names[1]
    return ".".join(str(name)[:SHOWN] for name in names) or "recipe"


def _kinds_text(kinds: list[str]) -> str:
    """State which kinds of task have a field."""
    return f"kind {kinds[0]} has it" if len(kinds) == 1 else f"kinds {' and '.join(kinds)} have it"


def _unknown_key(location: tuple[int | str, ...]) -> str:
    """Describe the keys that are allowed in place of an unknown one, with a suggestion."""
    name, allowed = str(location[-1])[:SHOWN], _fields_at(location)
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    kinds = [k for k, kind in TASK_KINDS.items() if name in kind.model_fields]
    if location[0] == "task" and len(location) == 3 and kinds:
        hint = f"; {_kinds_text(kinds)}"
    return f"unknown key; allowed are {', '.join(allowed)}{hint}"


def _explain(error: ErrorDetails, where: str) -> str:
    """Describe a validation error: file, YAML path, found value, allowed values, suggestion."""
    location = error["loc"]
    path = _path_of(location)
    if error["type"] == "extra_forbidden":
        return f"{where}: {path}: {_unknown_key(location)}"
    if error["type"] == "missing":
        return f"{where}: {path}: is missing"
    message = error["msg"].removeprefix("Value error, ")
    found = error["input"]
    shown = "" if isinstance(found, dict | BaseModel) else f"found {repr(found)[:SHOWN]}; "
    hint = ""
    if error["type"] == "literal_error" and isinstance(found, str):
        choices = error["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        if close := difflib.get_close_matches(found[:SHOWN], choices, n=1):
            hint = f"; did you mean {close[0]}?"
    return f"{where}: {path}: {shown}{message[0].lower()}{message[1:]}{hint}"


def _read(file: Path) -> str:
    """Return the text of a recipe file.

    :raises UserError: if there is no such file, or it can't be read.
    """
    try:
        if not os.path.lexists(file):
            known = ", ".join(sorted(p.stem for p in file.parent.glob("*.yaml"))) or "none"
            raise UserError(
                f"{file}: no such recipe; recipes there: {known[:LONGEST_TEXT]}; built-in recipes: "
                f"{', '.join(builtin_recipes())}"
            )
        size = 0 if fault_of_file(file) else file.stat().st_size
    except (OSError, ValueError) as error:
        raise UserError(f"{str(file)[:SHOWN]!r}: can't be read: {error}") from error
    if size > LARGEST_BYTES:
        raise UserError(f"{file}: has {size} bytes; a recipe has at most {LARGEST_BYTES}")
    return decode_text(read_bounded(file, LARGEST_BYTES), file)


def load_recipe(
    file: Path, overrides: tuple[str, ...] = (), model_path: Path | None = None
) -> Recipe:
    """Read and check a recipe.

    :param file: path of a recipe, or the name of a built-in recipe.
    :param overrides: ``a.b=value`` settings applied on top of the file.
    :param model_path: a local model folder that replaces the recipe's model.
    :raises UserError: listing every fault found.
    """
    file = find_recipe(file)
    return parse_recipe(_read(file), file, overrides, model_path)


def parse_recipe(
    text: str, file: Path, overrides: tuple[str, ...] = (), model_path: Path | None = None
) -> Recipe:
    """Check the text of a recipe; see :func:`load_recipe`.

    :param file: path for messages, and for the recipe's relative paths; it need not exist.
    """
    data = read_yaml(text, str(file))
    if not isinstance(data, dict):
        raise UserError(f"{file}: a recipe is a mapping, found {type(data).__name__}")
    _check_values(data, str(file))  # before an override is set in the target of an alias
    apply_overrides(data, overrides, read_yaml)
    if model_path is not None:
        data["model"] = {"path": str(real_path(model_path))}
    _check_values(data, str(file))
    try:
        recipe = Recipe.model_validate(data)
    except pydantic.ValidationError as error:
        faults = list(dict.fromkeys(_explain(e, str(file)) for e in error.errors()))
        more = [f"... and {len(faults) - MOST_LINES} more"] if len(faults) > MOST_LINES else []
        raise UserError("\n".join([*faults[:MOST_LINES], *more])) from None
    recipe._file = real_path(file)
    recipe._overrides = overrides
    return recipe
