"""Templates that build prompts and answers from the fields of an item. Allowed forms:

{name}   {name[index]}   {name[0][key]}   {name:format}   {{ and }} for braces
"""

import re
import string
from collections.abc import Mapping
from pathlib import Path

from sqft_export.errors import UserError

_FIELD = re.compile(r"([^.\[\]{}!:]+)((?:\[[^\[\]]+\])*)")
# At most three digits of width: a larger width would fill the memory.
_FORMAT = re.compile(r"[^{}\d]{0,3}\d{0,3}(\.\d{1,2})?[a-zA-Z%]?")
_PLAIN = (str, int, float)


def template_fault(template: str) -> str | None:
    """Return what is wrong with a template itself, independent of items; None if it is valid."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        return f"not a template: {error}; write {{{{ and }}}} for braces"
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if name == "":
            return "the template has an empty {}; write {{}} for braces"
        if not _FIELD.fullmatch(name) or conversion:
            shown = f"{{{name}{'!' + conversion if conversion else ''}}}"
            return f"found {shown}; allowed are {{name}}, {{name[index]}} and {{{{ }}}} for braces"
        if not _FORMAT.fullmatch(form or ""):
            return f"found {{{name}:{form}}}; a format has at most three digits of width"
    return None


def leading_text(template: str) -> str:
    """Return the literal text of a template before its first field."""
    parts = string.Formatter().parse(template)  # an escaped brace also ends a part
    leading = []
    for literal, name, _, _ in parts:
        leading.append(literal)
        if name is not None:
            break
    return "".join(leading)


def fill_template(template: str, item: Mapping[str, object], file: Path, number: int) -> str:
    """Return the text of a template with the fields of an item filled in.

    :raises UserError: if the item lacks a field or the field is not text; the message names file,
        line and field.
    """
    filled = []
    for literal, name, form, _ in string.Formatter().parse(template):
        filled.append(literal)
        if name is None:
            continue
        value = text_field(name, item, file, number)
        try:
            filled.append(format(value, form or ""))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file}:{number}: {{{name}:{form}}}: {error}") from error
    return "".join(filled)


def text_field(name: str, item: Mapping[str, object], file: Path, number: int) -> str | int | float:
    """Return a field of an item, such as ``text`` or ``messages[0][content]``.

    A boolean becomes ``true`` or ``false``, as in JSON.

    :raises UserError: if the field is missing, or is a list, an object or null.
    """
    found = _FIELD.fullmatch(name)
    path = [found[1], *re.findall(r"\[([^\[\]]+)\]", found[2])] if found else [name]
    value: object = item
    for depth, key in enumerate(path):
        try:
            value = _entry(value, key)
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(
                f"{file}:{number}: the template needs {name}; {_describe(value, path[:depth])}"
            ) from error
    if not isinstance(value, _PLAIN):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise UserError(f"{file}:{number}: {name} is {kind}, not text")
    return str(value).lower() if isinstance(value, bool) else value


def _entry(value: object, key: str) -> object:
    """Return an entry of a list or an object.

    :raises KeyError, IndexError, ValueError: if it has no such entry.
    """
    if isinstance(value, list):
        return value[int(key)]
    if isinstance(value, Mapping):
        return value[key]
    raise KeyError(key)


def _describe(value: object, path: list[str]) -> str:
    """Return what was found at a path, for an error message."""
    owner = path[-1] if path else "the item"
    if isinstance(value, dict):
        return f"{owner} has {', '.join(value) or 'no fields'}"
    if isinstance(value, list):
        return f"the item has {owner} with {len(value)} entr{'y' if len(value) == 1 else 'ies'}"
    return f"{owner} is a {type(value).__name__}"
