"""Write a recipe as YAML with a comment per field."""

import json
import textwrap
from typing import Any

from sqft_export.recipe.fields import recipe_fields, section_about

COMMENT_WIDTH = 96


def recipe_text(recipe: dict[str, Any], head: str) -> str:
    """Return a recipe as YAML 1.2, with the meaning of every field above it.

    :param recipe: the content of a recipe file: sections with plain values.
    :param head: comment at the top of the file.
    """
    lines = _comment(head, "")
    for name, value in recipe.items():
        lines.append("")
        if isinstance(value, dict):
            kind = value.get("kind") if name == "task" else None
            section = f"task ({kind})" if kind else name
            lines += [*_comment(section_about(section), ""), f"{name}:"]
            for field, inner in value.items():
                lines += [*_comment(_about(section, f"{name}.{field}"), "  ")]
                lines.append(f"  {field}: {_yaml(inner)}")
        else:
            lines += [*_comment(_about(None, name), ""), f"{name}: {_yaml(value)}"]
    return "\n".join(lines) + "\n"


def _about(section: str | None, path: str) -> str:
    """Return the description of a field; empty for a field that the schema does not describe."""
    found = (
        row.about for row in recipe_fields() if row.field == path and section in (None, row.section)
    )
    return next(found, "")


def _comment(text: str, indent: str) -> list[str]:
    wrapped = textwrap.wrap(text, COMMENT_WIDTH - len(indent)) if text else []
    return [f"{indent}# {line}" for line in wrapped]


def _yaml(value: Any) -> str:
    """Return a plain value in flow style: JSON is YAML 1.2."""
    if isinstance(value, str) and value.replace("-", "").replace("_", "").isalpha():
        return value if value not in ("null", "true", "false") else json.dumps(value)
    return json.dumps(value, ensure_ascii=False)
