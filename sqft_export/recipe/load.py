"""YAML 1.2 and overrides to a recipe; what is wrong, as a user reads it."""

import difflib
from pathlib import Path
from typing import Any

import pydantic
from pydantic import BaseModel
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from sqft_export.errors import UserError
from sqft_export.recipe.schema import TASK_KINDS, Recipe


def _read_yaml(text: str, where: str) -> Any:
    yaml = YAML(typ="safe", pure=True)  # YAML 1.2: 1e-4 is a number, 2:4 is not
    try:
        return yaml.load(text)
    except MarkedYAMLError as error:
        raise UserError(f"{where}: not valid YAML: {error.problem} {error.problem_mark}") from error


def _override(data: dict[str, Any], setting: str) -> None:
    """Apply ``a.b.c=value``, the value read as YAML."""
    path, equals, text = setting.partition("=")
    if not equals:
        raise UserError(f"override {setting!r}: expected path=value, as sparsify.sparsity=0.6")
    *parents, last = path.split(".")
    section = data
    for name in parents:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise UserError(f"override {setting!r}: {name} is a value, not a section")
    section[last] = _read_yaml(text, f"override {setting!r}")


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Names of the fields allowed beside the one at ``location``."""
    model: Any = Recipe
    for name in location[:-1]:
        if name in TASK_KINDS and model is None:
            model = TASK_KINDS[str(name)]
            continue
        field = model.model_fields.get(name) if model else None
        annotation = field.annotation if field else None
        is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        model = annotation if is_section else None
    return list(model.model_fields) if model else []


def _explain(error: Any, where: str) -> str:
    """One validation error as: file, YAML path, what was found, what is allowed, a suggestion."""
    location = error["loc"]
    path = ".".join(str(p) for p in location if p not in TASK_KINDS) or "recipe"
    if error["type"] == "extra_forbidden":
        allowed = _fields_at(location)
        close = difflib.get_close_matches(str(location[-1]), allowed, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"{where}: {path}: unknown key; allowed are {', '.join(allowed)}{hint}"
    if error["type"] == "missing":
        return f"{where}: {path}: is missing"
    message = error["msg"].removeprefix("Value error, ")
    found = error["input"]
    shown = "" if isinstance(found, dict | BaseModel) else f"found {found!r}; "
    hint = ""
    if error["type"] == "literal_error" and isinstance(found, str):
        choices = error["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        if close := difflib.get_close_matches(found, choices, n=1):
            hint = f"; did you mean {close[0]}?"
    return f"{where}: {path}: {shown}{message[0].lower()}{message[1:]}{hint}"


def load_recipe(
    file: Path, overrides: tuple[str, ...] = (), model_path: Path | None = None
) -> Recipe:
    """Read and check a recipe.

    :param overrides: ``a.b=value`` settings applied on top of the file.
    :param model_path: a local model folder that takes the place of the recipe's model.
    :raises UserError: listing every fault found.
    """
    if not file.is_file():
        known = ", ".join(sorted(p.stem for p in file.parent.glob("*.yaml"))) or "none"
        raise UserError(f"{file}: no such recipe; recipes there: {known}")
    data = _read_yaml(file.read_text(), str(file))
    if not isinstance(data, dict):
        raise UserError(f"{file}: a recipe is a mapping, found {type(data).__name__}")
    for setting in overrides:
        _override(data, setting)
    if model_path is not None:
        data["model"] = {"path": str(model_path.resolve())}
    try:
        recipe = Recipe.model_validate(data)
    except pydantic.ValidationError as error:
        lines = [_explain(e, str(file)) for e in error.errors()]
        raise UserError("\n".join(lines)) from None
    recipe._file = file.resolve()
    return recipe
